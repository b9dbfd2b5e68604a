"""A probe takes real steps and leaves no trace on the model that will be trained."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from tuneship.core.recipe import Model, Recipe
from tuneship.core.shape import Shape
from tuneship.train.model import load_base
from tuneship.train.planning import calibration, probe
from tuneship.train.planning.calibration import Calibration, Sample
from tuneship.train.planning.memory import Setting


def recipe(**train) -> Recipe:
    sections = {"quantization": {"method": "none"}, "train": {"method": "lora", **train}}
    return Recipe.model_validate({"model": {"id": "tiny"}, "data": {"train": "t"}, **sections})


@pytest.fixture
def base(tiny_model):
    return load_base(tiny_model, Model(id="tiny", dtype="float32"))


@pytest.mark.parametrize("kernels", ["peft", "fused"])
def test_a_measured_base_is_as_it_was(base, tokenizer, kernels):
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    forwards = [module.__dict__.get("forward") for module in base.modules()]
    drawn = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    found = probe.measure(base, tokenizer, recipe(kernels=kernels), Setting(2, 1), 24)
    assert found.step_s > 0
    assert found.setting == Setting(2, 1)
    assert base.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in base.state_dict().items())
    assert [module.__dict__.get("forward") for module in base.modules()] == forwards
    assert not any(getattr(module, "gradient_checkpointing", False) for module in base.modules())
    assert random.getstate() == drawn[0]
    assert np.random.get_state()[1].tolist() == drawn[1]  # noqa: NPY002 - what the libraries draw from
    assert torch.equal(torch.get_rng_state(), drawn[2])


def test_both_lines_are_measured_as_far_as_asked(base, tokenizer):
    found = probe.calibrate(base, tokenizer, recipe(), 24, again=4, kept=1)
    assert [sample.setting for sample in found.again] == [Setting(2, 0), Setting(4, 0)]
    assert [sample.setting for sample in found.kept] == [Setting(1, 2)]
    assert probe.calibrate(base, tokenizer, recipe(), 24, again=0, kept=0) == Calibration(2, (), ())


def test_what_was_measured_is_found_again_by_the_same_recipe_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNESHIP_CACHE", str(tmp_path))
    shape = Shape(64, 128, 2, 4, 2, 16, 90, tied=True)
    found = Calibration(2, (Sample(Setting(2, 0), 10, 0.5), Sample(Setting(4, 0), 12, 0.75)), ())
    calibration.keep(found, recipe(), shape, 24)
    assert calibration.find(recipe(), shape, 24) == found
    assert calibration.find(recipe(), shape, 25) is None
    assert calibration.find(recipe(kernels="fused"), shape, 24) is None
    assert calibration.find(recipe(), shape._replace(layers=3), 24) is None
