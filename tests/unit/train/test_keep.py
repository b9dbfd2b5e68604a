"""Layers that keep their activations or are compiled for the length of a training, and not after."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tuneship.train.kernels import fused
from tuneship.train.kernels.keep import CompileLayers, KeepLayers, decoder_layers
from tuneship.train.model import linear_layers

IDS = torch.randint(0, 90, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(tiny_model):
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    return get_peft_model(base, LoraConfig(r=4, target_modules=linear_layers(base))).train()


def test_the_first_layers_keep_theirs(model):
    model.gradient_checkpointing_enable()
    KeepLayers(model, 1).on_train_begin()
    assert [layer.gradient_checkpointing for layer in decoder_layers(model)] == [False, True]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_layers_compute_the_same_and_are_themselves_again_afterwards(model):
    fused.install(model)
    plain = model(input_ids=IDS, labels=IDS).loss
    compiled = CompileLayers(model)
    compiled.on_train_begin()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-5)
    compiled.on_train_end()
    assert all(layer._compiled_call_impl is None for layer in decoder_layers(model))
