"""Text of other people's files in our messages: one line that prints, and an end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneship.core.quoting import on_one_line, quoted


@given(st.text(st.characters(), max_size=300))
def test_whatever_it_is_it_prints_on_one_line(text: str):
    assert quoted(text).isprintable()
    assert on_one_line(text).isprintable()


@pytest.mark.parametrize("text", ["", "org/base", "it's", "é 漢字", "C:\\models"])
def test_plain_text_is_left_alone(text: str):
    assert on_one_line(text) == text


def test_what_is_far_too_long_is_cut():
    text = "\x1b" * 10_000_000
    assert len(quoted(text)) < 1_000
    assert len(on_one_line(text)) < 10_000
    assert on_one_line(on_one_line("a\nb")) == on_one_line("a\nb") == "a\\nb"
