"""Three ways to train one recipe: what differs among them, and what happens when one cannot be measured."""

from __future__ import annotations

import json

import pytest

from tuneship.core import hardware, recipe_file
from tuneship.core.errors import TrainError
from tuneship.core.recipe import Recipe
from tuneship.train import speed
from tuneship.train.elsewhere import unsloth_backend
from tuneship.train.elsewhere.unsloth_backend import Made


def recipe(tiny_model, tmp_path) -> Recipe:
    rows = [
        {"messages": [{"role": "user", "content": f"{i} and {j}"}, {"role": "assistant", "content": str(i + j)}]}
        for i in range(5)
        for j in range(5)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    sections = {"data": {"train": str(file)}, "train": {"effective_batch": 8, "learning_rate": 1e-3}}
    return Recipe.model_validate({"model": {"id": str(tiny_model)}, **sections})


def test_the_copied_recipe_is_what_people_copy_and_ours_is_the_recipe(tiny_model, tmp_path):
    given = recipe(tiny_model, tmp_path)
    copied = speed.variant(given, "copied-recipe")
    assert (copied.train.micro_batch, copied.train.effective_batch, copied.lora.dropout) == (2, 16, 0.05)
    assert copied.train.kernels == "peft"
    assert copied.train.liger is False
    assert copied.train.learning_rate == given.train.learning_rate
    assert speed.variant(given, "tuneship") is given


@pytest.mark.slow
def test_nothing_measured_is_an_error(tiny_model, tmp_path, capsys):
    given = recipe(tiny_model, tmp_path)
    (tmp_path / "rows.jsonl").write_text("no JSON")
    with pytest.raises(TrainError, match="nothing could be measured"):
        speed.compare(given, ["tuneship"], 3)
    assert "tuneship could not be measured" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ways_beside_each_other(tiny_model, tmp_path):
    copied, ours = speed.compare(recipe(tiny_model, tmp_path), ["copied-recipe", "tuneship"], 4)
    assert (copied.name, copied.micro_batch, copied.accumulation) == ("copied-recipe", 2, 8)
    assert (ours.name, ours.micro_batch, ours.accumulation) == ("tuneship", 8, 1)
    assert ours.tokens_per_s > copied.tokens_per_s > 0
    assert ours.first_loss == pytest.approx(copied.first_loss, abs=0.5)
    assert ours.versions == hardware.versions()
    assert ours.attention == {"implementation": "sdpa"}


def test_a_row_of_unsloth_carries_what_unsloth_s_own_environment_had(tiny_model, tmp_path, monkeypatch):
    there = {"unsloth": "1.2.3", "transformers": "5.17.0"}, {"implementation": "sdpa", "importable": ["xformers"]}

    def trained(base, pad_id, rows, recipe, plan, attempt):
        line = json.dumps({"loss": 2.0, "step_s": 0.5}) + "\n"
        (attempt / "metrics.jsonl").write_text(4 * line)
        return Made(attempt, 2**30, *there)

    monkeypatch.setattr(unsloth_backend, "fit", trained)
    recipe_file.save(recipe(tiny_model, tmp_path), tmp_path / "recipe.toml")
    row = speed._measure("unsloth", 4, tmp_path)
    assert (row["versions"], row["attention"]) == there
    assert (row["peak_gib"], row["first_loss"], row["micro_batch"]) == (1.0, 2.0, 8)
