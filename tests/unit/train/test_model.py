"""A base as it is trained on, and the adapters that a recipe asks for."""

from __future__ import annotations

import pytest

from tuneship.core.errors import TrainError
from tuneship.core.recipe import Lora, Model, Quantization, Recipe

torch = pytest.importorskip("torch")

from tests.unit.train import fitting  # noqa: E402 - needs torch
from tuneship.train import model as models  # noqa: E402
from tuneship.train import prepare, stages  # noqa: E402
from tuneship.train.data import store  # noqa: E402
from tuneship.train.data.dataset import Dataset  # noqa: E402
from tuneship.train.fitting import fit  # noqa: E402

MINIMAL = {"model": {"id": "m"}, "data": {"train": "t"}}


@pytest.mark.parametrize("method", ["nf4", "fp4"])
def test_a_base_is_packed_as_the_recipe_says(tiny_model, method):
    base = models.load_base(tiny_model, Model(id="m", dtype="float32"), Quantization(method=method))
    assert base.model.layers[0].mlp.up_proj.weight.quant_type == method


def test_an_attention_that_is_not_there_falls_back(tiny_model, capsys):
    base = models.load_base(tiny_model, Model(id="m", dtype="float32", attention="flash_attention_2"))
    assert base.config._attn_implementation == "sdpa"
    assert "no flash_attention_2 for this model here" in capsys.readouterr().err


def test_liger_that_is_wanted_and_not_there_is_said(tiny_model, monkeypatch):
    monkeypatch.setattr(fit, "is_liger_kernel_available", lambda: False)
    base = models.load_base(tiny_model, Model(id="m", dtype="float32"))
    before = base.model.norm.forward.__func__
    with pytest.raises(TrainError, match="Liger is not installed"):
        fit.install_liger(base, True)
    fit.install_liger(base, "auto")
    assert base.model.norm.forward.__func__ is before


def test_patterns_and_dora_reach_peft(tiny_model):
    from peft import get_peft_model

    lora = Lora(rank=4, alpha=8, dora=True, rank_pattern={"q_proj": 2}, alpha_pattern={r"layers\.1\..*v_proj": 24})
    base = models.load_base(tiny_model, Model(id="m", dtype="float32"))
    trained = get_peft_model(base, models.lora_config(lora, base))
    layers = trained.base_model.model.model.layers
    assert layers[0].self_attn.q_proj.r["default"] == 2
    assert layers[0].self_attn.v_proj.scaling["default"] == 2
    assert layers[1].self_attn.v_proj.scaling["default"] == 6
    assert layers[0].self_attn.q_proj.use_dora["default"]


@pytest.mark.parametrize(
    ("sections", "complaint"),
    [
        ({"lora": {"dora": True}, "serve": {"mode": "adapters"}}, "SGLang has no DoRA"),
        ({"lora": {"rank_pattern": {"q_proj": 128}}, "serve": {"mode": "adapters"}}, "lora.rank = 128 is over"),
        ({"train": {"method": "lora"}}, "needs quantization.method = 'none', not 'nf4'"),
        ({"quantization": {"method": "none"}}, "needs quantization.method = 'nf4', not 'none'"),
        (
            {"quantization": {"method": "fp4"}, "serve": {"mode": "adapters", "quantization": "nf4"}},
            "another base than quantization.method = 'fp4'",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(sections, complaint):
    with pytest.raises(ValueError, match=complaint):
        Recipe.model_validate(MINIMAL | sections)


def test_fp4_is_a_way_to_train_qlora():
    assert Recipe.model_validate(MINIMAL | {"quantization": {"method": "fp4"}}).quantization.method == "fp4"


@pytest.mark.parametrize(
    ("lora", "facts"),
    [
        ({}, []),
        ({"dora": True}, ["sets use_dora = True: SGLang has no DoRA"]),
        ({"target_modules": ["lm_head"]}, ["changes lm_head; the server wraps q_proj"]),
        (
            {"dora": True, "target_modules": ["q_proj", "up_proj"]},
            [
                "sets use_dora = True: SGLang has no DoRA",
                "changes q_proj without v_proj, with which SGLang stacks it into one layer",
                "changes up_proj without gate_proj, with which SGLang stacks it into one layer",
            ],
        ),
    ],
)
def test_what_cannot_be_served_is_said_before_it_is_trained(tiny_model, capsys, lora, facts):
    recipe = Recipe.model_validate(MINIMAL | {"model": {"id": str(tiny_model), "dtype": "float32"}, "lora": lora})
    stages._load(prepare.prepare(recipe), recipe)
    said = [line for line in capsys.readouterr().err.splitlines() if "cannot be served" in line]
    assert len(said) == len(facts)
    for line, fact in zip(said, facts, strict=True):
        assert line.startswith(f"the adapter cannot be served beside its base: it {fact}")
        assert line.endswith(". It has to be merged")


def test_what_cannot_be_served_is_said_before_unsloth_trains_it(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    lora, train = {"target_modules": ["lm_head"]}, {"backend": "unsloth"}
    recipe = Recipe.model_validate(MINIMAL | {"model": {"id": str(tiny_model)}, "lora": lora, "train": train})
    prepared, rows = prepare.prepare(recipe), Dataset(store.stored(fitting.rows()), "")
    with pytest.raises(TrainError, match="needs a CUDA device"):
        stages._learn_elsewhere(prepared, rows, recipe, fitting.plan(recipe, 2), tmp_path, None)
    assert "cannot be served beside its base: it changes lm_head;" in capsys.readouterr().err
