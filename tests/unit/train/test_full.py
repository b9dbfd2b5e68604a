"""Full training: all weights learn in float32; what is written is what it learnt, rounded once and held against it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from tuneship.core.errors import ParityError
from tuneship.core.recipe import Recipe
from tuneship.core.shape import Shape

torch = pytest.importorskip("torch")

from tests.unit.train import fitting  # noqa: E402 - needs torch
from tuneship.train import parity  # noqa: E402
from tuneship.train.fitting import checkpoints, full  # noqa: E402
from tuneship.train.planning.memory import Setting, estimate  # noqa: E402

HELD_OUT = fitting.rows((11, 30, 19, 8))


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    """(recipe, model, reference, attempt) after six steps."""
    attempt = tmp_path_factory.mktemp("full") / "attempt-1"
    keys = {"method": "full", "steps": 6, "learning_rate": 1e-3, "save_steps": 3}
    recipe = fitting.recipe(tiny_model, **keys)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": "bfloat16"})})
    base = full.load_base(tiny_model, recipe)
    assert base.dtype == torch.float32
    before = full.Before(base, HELD_OUT, 0)
    model = fitting.train(tiny_model, attempt, model=base, **keys)
    return recipe, model, before.reference(model), attempt


def source(tiny_model, tokenizer):
    return SimpleNamespace(source=SimpleNamespace(path=tiny_model), tokenizer=tokenizer, end_ids=(2,), pad_id=0)


def test_every_weight_learns(trained, tiny_model):
    _, model, reference, _ = trained
    fresh, _ = fitting.load(tiny_model)
    assert all(not torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))
    assert reference[0].base == pytest.approx(parity.token_log_p(fresh, HELD_OUT, 0)[0], abs=1e-5)
    assert reference[0].trained != reference[0].base


def test_the_checkpoint_is_what_was_learnt_rounded_once(trained, tiny_model, tokenizer, tmp_path):
    recipe, model, reference, _ = trained
    metrics = full.write(model, source(tiny_model, tokenizer), recipe, reference, tmp_path, force=False)
    from transformers import AutoModelForCausalLM

    written = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert written.dtype == torch.bfloat16
    for name, value in model.state_dict().items():
        assert torch.equal(written.state_dict()[name], value.bfloat16()), name
    assert written.generation_config.eos_token_id == [2]
    assert json.loads((tmp_path / "config.json").read_text())["use_cache"]
    assert abs(metrics["nll"] - metrics["nll_reference"]) < 0.02
    assert model.dtype == torch.float32


def test_a_rounding_that_costs_too_much_is_refused(trained, tiny_model, tokenizer, tmp_path, monkeypatch):
    recipe, model, reference, _ = trained
    strict = recipe.merge.model_copy(update={"max_nll_increase": 0.0})
    compare = parity.compare

    def worse(*given):
        found = compare(*given)
        return {name: one._replace(nll=one.nll_reference + 0.01) for name, one in found.items()}

    monkeypatch.setattr(parity, "compare", worse)
    recipe = recipe.model_copy(update={"merge": strict})
    with pytest.raises(ParityError, match=r"0\.0100 nats per token worse"):
        full.write(model, source(tiny_model, tokenizer), recipe, reference, tmp_path, force=False)


def test_it_goes_on_from_a_checkpoint(trained, tiny_model, tmp_path):
    recipe, _, _, attempt = trained
    last = checkpoints.last_of(attempt)
    assert last.marker.step == 6
    half = checkpoints._read(attempt / "checkpoints" / "checkpoint-3")
    keys = {"method": "full", "steps": 6, "learning_rate": 1e-3}
    fitting.train(tiny_model, tmp_path / "attempt-2", model=full.load_base(tiny_model, recipe), resume=half, **keys)
    ours, theirs = ((path / "metrics.jsonl").read_text().splitlines() for path in (tmp_path / "attempt-2", attempt))
    losses = [[json.loads(line)["loss"] for line in lines] for lines in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_it_takes_what_float32_and_its_optimizer_take():
    shape = Shape(1536, 8960, 28, 12, 2, 128, 151936, tied=True)
    base = {"model": {"id": "m"}, "data": {"train": "t"}, "quantization": {"method": "none"}}
    recipe = Recipe.model_validate(base | {"train": {"method": "full", "optimizer": "adamw"}})
    found = estimate(recipe, shape, Setting(1, 0), 1024)
    everything = shape.linear_parameters + shape.embedding_parameters
    # Weights, gradients and two moments in float32, and a copy in 16 bits.
    assert found.weights + found.adapter == (4 + 4 + 8 + 2) * everything


@pytest.mark.parametrize(
    "sections",
    [
        {"serve": {"mode": "adapters"}},
        {"merge": {"quantize": "fp8"}},
        {"train": {"method": "full", "kernels": "fused"}},
    ],
)
def test_what_needs_an_adapter_is_refused(sections):
    base = {"model": {"id": "m"}, "data": {"train": "t"}, "quantization": {"method": "none"}}
    with pytest.raises(ValueError, match=r"does not go with train\.method = 'full', which makes no adapter"):
        Recipe.model_validate(base | {"train": {"method": "full"}} | sections)
