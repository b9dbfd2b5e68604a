"""A smoke run takes rows from everywhere, and ends well only when the loss fell."""

from __future__ import annotations

import json
import tomllib

import pytest

from tuneship.core.errors import TrainError
from tuneship.core.recipe import Recipe
from tuneship.train.data.dataset import Dataset
from tuneship.train.data.store import store
from tuneship.train.data.template import IGNORED, Encoded
from tuneship.train.fitting import smoke


def dataset(count: int) -> Dataset:
    return Dataset(store([Encoded([i], [i]) for i in range(count)]), "sha")


def attempt(tmp_path, losses):
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(losses, 1)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_rows_are_taken_from_the_whole_file():
    assert [row.input_ids[0] for row in smoke.subset(dataset(10), 4).rows] == [0, 2, 5, 7]
    for count in (500, 0):
        assert list(smoke.subset(dataset(3), count).rows) == list(dataset(3).rows)


def test_its_figures_are_those_of_its_rows():
    rows = [Encoded([7] * length, [IGNORED] * (length - 1) + [7]) for length in (1, 2, 3, 4)]
    few = smoke.subset(Dataset(store(rows), "sha"), 2)
    assert (few.tokens, few.longest, few.loss_tokens) == (4, 3, 2)


@pytest.mark.parametrize(
    ("train", "rows", "steps"),
    [
        ("steps = 300", 500, 32),  # one pass, of 16 rows a step
        ("steps = 300", 60, 8),  # two passes, to see a fall
        ("steps = 20", 500, 20),
        ("epochs = 3", 500, 32),
        ("epochs = 0.1", 500, 13),  # a tenth of 2,000 rows
        ("steps = 5", 500, 5),
    ],
)
def test_it_is_one_pass_within_the_recipes_own_steps(train: str, rows: int, steps: int):
    recipe = Recipe.model_validate(
        tomllib.loads(f'name = "x"\n[model]\nid = "m"\n[data]\ntrain = "rows.jsonl"\n[train]\n{train}')
    )
    short = smoke.shortened(recipe, 2000, rows)
    assert short.train.steps == steps
    assert short.train.model_copy(update={"steps": recipe.train.steps}) == recipe.train


def test_a_loss_that_falls_is_good(tmp_path):
    smoke.require_fall(attempt(tmp_path, [3.0, 2.9, 3.1, 2.5, 2.6, 2.4, 2.2, 2.3]))


@pytest.mark.parametrize("losses", [[2.0, 2.1, 3, 1, 1, 1, 2.0, 2.1], [2.0] * 8])
def test_one_that_does_not_is_an_error(tmp_path, losses):
    with pytest.raises(TrainError, match="the loss did not fall: 2"):
        smoke.require_fall(attempt(tmp_path, losses))


def test_too_few_steps_tell_nothing(tmp_path):
    with pytest.raises(TrainError, match="3 steps are too few") as caught:
        smoke.require_fall(attempt(tmp_path, [3.0, 2.0, 1.0]))
    assert "--train.steps 8" in caught.value.hint
