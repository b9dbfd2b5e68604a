"""Fused layers on a CUDA device: PEFT's losses and gradients in bf16, with Triton's kernels; a plan that is measured.

Not run where there is none, and said so. The model is the tiny one, in NF4.
"""

from __future__ import annotations

import pytest

from tuneship.core.hardware import detect

torch = pytest.importorskip("torch")

from tests.unit.train import fitting  # noqa: E402 - needs torch
from tuneship.core.recipe import Quantization  # noqa: E402
from tuneship.core.shape import Shape  # noqa: E402
from tuneship.train.kernels import fused, swiglu  # noqa: E402
from tuneship.train.model import linear_layers, load_base  # noqa: E402
from tuneship.train.planning import calibration, plan, probe  # noqa: E402
from tuneship.train.planning.memory import Setting  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not detect().gpus, reason="NOT RUN: this machine has no CUDA device"),
]


def test_tritons_swiglu_is_autograds():
    gate, up, grad = (torch.randn(5, 1000, device="cuda").requires_grad_() for _ in range(3))
    out = torch.nn.functional.silu(gate) * up
    expected = torch.autograd.grad(out, (gate, up), grad)
    torch.testing.assert_close(swiglu.forward(gate.detach(), up.detach()), out.detach())
    act, grad_gate, grad_up = swiglu.backward_(*(tensor.detach().clone() for tensor in (gate, up, grad)))
    torch.testing.assert_close(act, out.detach())
    torch.testing.assert_close((grad_gate, grad_up), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loss_and_gradients_are_pefts(tiny_model, dtype):
    from peft import LoraConfig, get_peft_model

    given = fitting.recipe(tiny_model).model.model_copy(update={"dtype": dtype})
    ids = torch.randint(3, 400, (4, 33), generator=torch.Generator().manual_seed(0)).cuda()
    found = []
    for install in (False, True):
        base = load_base(tiny_model, given, Quantization())
        torch.manual_seed(0)
        model = get_peft_model(base, LoraConfig(r=4, target_modules=linear_layers(base))).train()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        if install:
            assert fused.install(model).mlps == 2
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append((loss.item(), [p.grad.float() for p in model.parameters() if p.requires_grad]))
    (loss, gradients), (other, others) = found
    assert other == pytest.approx(loss, abs=1e-2)
    limit = 1e-3 if dtype == "float32" else 0.1
    for mine, theirs in zip(others, gradients, strict=True):
        assert (mine - theirs).norm() <= limit * theirs.norm()


def test_a_plan_is_measured_once_and_remembered(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("TUNESHIP_CACHE", str(tmp_path))
    given = fitting.recipe(tiny_model, method="qlora", optimizer="paged_adamw_8bit")
    given = given.model_copy(update={"model": given.model.model_copy(update={"dtype": "auto"})})
    base = load_base(tiny_model, given.model, given.quantization)
    _, tokenizer = fitting.load(tiny_model)
    shape = Shape.of(base.config.to_dict())
    first = plan.make(given, shape, detect(), rows=12, tokens=300, longest=40)
    assert first.step_s == 0
    measured = probe.refine(base, tokenizer, given, first)
    assert measured.step_s > 0
    assert measured.estimated_bytes > 2**28  # CUDA's context is in it
    found = calibration.find(given, shape, 40)
    assert found is not None
    assert found.peak_bytes(Setting(measured.micro_batch, measured.kept_layers)) == measured.estimated_bytes
    assert probe.refine(base, tokenizer, given, measured) is measured
