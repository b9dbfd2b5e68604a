"""The recipes that are shipped can be read, and fit the cards that they are for: from the models' shapes alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuneship.core import recipe_file
from tuneship.core.errors import PlanError
from tuneship.core.hardware import Gpu, Hardware
from tuneship.core.shape import Shape
from tuneship.train.planning.plan import Plan, make

RECIPES = Path(__file__).parents[3] / "recipes"
LLAMA_7B = Shape(4096, 11008, 32, 32, 32, 128, 32000, tied=False)
LLAMA_70B = Shape(8192, 28672, 80, 64, 8, 128, 32000, tied=False)
MISTRAL_7B = Shape(4096, 14336, 32, 32, 8, 128, 32768, tied=False)
QWEN_1_5B = Shape(1536, 8960, 28, 12, 2, 128, 151936, tied=True)
QWEN_3B = Shape(2048, 11008, 36, 16, 2, 128, 151936, tied=True)


def plan_on(name: str, shape: Shape, gib: float, capability: tuple[int, int] = (8, 6)) -> Plan:
    recipe = recipe_file.load(RECIPES / name)
    machine = Hardware((Gpu("card", int(gib * 2**30), capability),), "1", "cpu", 8, 32 * 2**30)
    return make(recipe, shape, machine, rows=640, tokens=640 * 120, longest=recipe.data.max_length)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.name)
def test_it_can_be_read(path):
    recipe = recipe_file.load(path)
    assert recipe_file.data_files(recipe.data.train)
    assert recipe_file.data_files(recipe.data.heldout)


@pytest.mark.parametrize(
    ("name", "shape", "gib"),
    [
        ("qwen2.5-1.5b-12gb.toml", QWEN_1_5B, 12),
        ("llama-2-7b-8gb.toml", LLAMA_7B, 8),
        ("mistral-7b-12gb.toml", MISTRAL_7B, 12),
        ("qwen2.5-3b-t4.toml", QWEN_3B, 15.6),
    ],
)
def test_it_fits_its_card_at_the_same_effective_batch(name, shape, gib):
    plan = plan_on(name, shape, gib)
    assert plan.micro_batch * plan.accumulation == 16
    assert plan.estimated_bytes <= plan.budget_bytes < gib * 2**30
    with pytest.raises(PlanError):
        plan_on(name, shape, shape.linear_parameters * 0.5 / 2**30)


def test_70b_does_not_fit_24_gb_and_is_refused_before_anything_is_loaded():
    with pytest.raises(PlanError, match=r"need about \d+\.\d GiB, over the 2\d\.\d GiB") as refused:
        plan_on("llama-2-70b-24gb.toml", LLAMA_70B, 24)
    assert refused.value.hint
    assert plan_on("llama-2-70b-24gb.toml", LLAMA_70B, 48).micro_batch >= 1
