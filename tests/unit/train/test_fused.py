"""Fused LoRA layers compute what PEFT's do, and leave alone what they cannot."""

from __future__ import annotations

import copy
from statistics import median

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from tuneship.core.recipe import Model, Quantization
from tuneship.train.kernels import fused, swiglu
from tuneship.train.kernels.fused import Installed
from tuneship.train.model import linear_layers, load_base

IDS = torch.randint(0, 90, (3, 17), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def base(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


def adapted(base, **config):
    """A PEFT model in training whose adapters do something."""
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": linear_layers(base)} | config
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def loss_and_gradients(model):
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_same(model, other, rtol=1e-4):
    (loss, gradients), (other_loss, others) = loss_and_gradients(model), loss_and_gradients(other)
    assert loss == pytest.approx(other_loss, abs=1e-5)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        assert (gradient - others[name]).norm() <= rtol * others[name].norm(), name


def test_loss_and_every_gradient_are_pefts(base):
    plain, ours = adapted(base), adapted(base)
    assert fused.install(ours) == Installed(mlps=2, groups=2, layers=2)
    assert_same(ours, plain)


def test_in_16_bits_its_gradients_are_no_further_from_the_exact_ones_than_pefts(base):
    exact, plain, ours = adapted(base).bfloat16().float(), adapted(base).bfloat16(), adapted(base).bfloat16()
    fused.install(ours)
    expected = loss_and_gradients(exact)[1]

    def errors(model):
        found = loss_and_gradients(model)[1]
        return [((found[name].float() - g).norm() / g.norm()).item() for name, g in expected.items()]

    assert median(errors(ours)) <= 1.2 * median(errors(plain)) <= 0.1


def test_an_mlp_may_be_left_to_its_own_code(base):
    plain, ours = adapted(base), adapted(base)
    assert fused.install(ours, mlps=False) == Installed(mlps=0, groups=2, layers=8)
    assert_same(ours, plain)


def test_ligers_mlp_is_one_too(tiny_model, base, monkeypatch):
    """Once a model was trained with Liger, this process builds the next one of Liger's classes."""
    liger = pytest.importorskip("liger_kernel.transformers.swiglu")
    monkeypatch.setattr(modeling_llama, "LlamaMLP", liger.LigerSwiGLUMLP)
    ours = adapted(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32))
    assert fused.install(ours) == Installed(mlps=2, groups=2, layers=2)
    assert_same(ours, adapted(base))


def test_on_packed_weights_too(tiny_model):
    packed = load_base(tiny_model, Model(id="tiny", dtype="float32"), Quantization(compute_dtype="float32"))
    plain, ours = adapted(packed), adapted(packed)
    assert fused.install(ours).mlps == 2
    assert_same(ours, plain)


def test_with_layers_computed_again(base):
    plain, ours = adapted(base), adapted(base)
    fused.install(ours)
    for model in (plain, ours):
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    assert_same(ours, plain)


def test_ranks_and_strengths_that_differ_among_siblings(base):
    patterns = {"rank_pattern": {"k_proj": 2, "up_proj": 6}, "alpha_pattern": {"q_proj": 3, "gate_proj": 5}}
    plain, ours = adapted(base, **patterns), adapted(base, **patterns)
    assert fused.install(ours).mlps == 2
    assert_same(ours, plain)


def test_some_layers_adapted_only(base):
    plain = adapted(base, target_modules=["q_proj", "v_proj", "up_proj"])
    ours = adapted(base, target_modules=["q_proj", "v_proj", "up_proj"])
    assert fused.install(ours) == Installed(mlps=0, groups=0, layers=6)
    assert_same(ours, plain)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize("config", [{"use_dora": True}, {"lora_dropout": 0.1}, {"lora_bias": True}])
def test_lora_that_is_not_plain_keeps_pefts_code(base, config):
    model = adapted(base, **config)
    assert fused.install(model) == Installed(0, 0, 0)


def test_four_bits_that_compute_in_another_dtype_are_left_to_peft(tiny_model):
    packed = load_base(tiny_model, Model(id="tiny", dtype="float32"), Quantization(compute_dtype="bfloat16"))
    assert fused.install(adapted(packed)) == Installed(0, 0, 0)


def test_outside_training_and_without_the_adapter_it_is_pefts_code(base):
    plain, ours = adapted(base), adapted(base)
    fused.install(ours)
    with torch.no_grad():
        assert torch.equal(ours(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    with ours.disable_adapter(), plain.disable_adapter():
        assert torch.equal(ours(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    ours.eval()
    plain.eval()
    assert torch.equal(ours(input_ids=IDS).logits, plain(input_ids=IDS).logits)


def test_a_sibling_that_is_called_with_another_input_is_computed_for_it(base):
    plain, ours = adapted(base), adapted(base)
    fused.install(ours)
    x, y = torch.randn(2, 5, 64), torch.randn(2, 5, 64)
    attention, other = ours.base_model.model.model.layers[0].self_attn, plain.base_model.model.model.layers[0].self_attn
    attention.q_proj(x)
    torch.testing.assert_close(attention.k_proj(y), other.k_proj(y))


def test_swiglu_and_its_gradients_are_those_of_autograd():
    gate, up, grad = (torch.randn(3, 8, dtype=torch.float64).float().requires_grad_() for _ in range(3))
    out = torch.nn.functional.silu(gate) * up
    expected = torch.autograd.grad(out, (gate, up), grad)
    torch.testing.assert_close(swiglu.forward(gate.detach(), up.detach()), out.detach())
    act, grad_gate, grad_up = swiglu.backward_(*(t.detach().clone() for t in (gate, up, grad)))
    torch.testing.assert_close(act, out.detach())
    torch.testing.assert_close((grad_gate, grad_up), expected)
