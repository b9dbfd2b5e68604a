"""A tokenizer that can wear any chat template."""

from __future__ import annotations

import pytest


@pytest.fixture
def tokenizer(tiny_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)
