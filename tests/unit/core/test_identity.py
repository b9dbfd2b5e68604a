"""Input ids: what makes a stage run again, and what does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tuneship.core import recipe_file
from tuneship.core.errors import DataError
from tuneship.core.identity import data_sha256, input_id

SECTIONS = ("model", "data", "lora", "bench")
EVAL = "[[bench.eval]]\ntask = 'sql'\ndata = 'a'"

Write = Callable[..., Path]


@pytest.fixture
def id_of(write_recipe: Write) -> Callable[..., str]:
    def make(*, stage: str = "train", version: int = 1, contents: tuple[str, ...] = ("c",), **overrides: str) -> str:
        dotted = {key.replace("__", "."): value for key, value in overrides.items()}
        recipe = recipe_file.load(write_recipe(EVAL), dotted)
        return input_id(stage, version, recipe, SECTIONS, contents)

    return make


@pytest.mark.parametrize(
    "change",
    [
        {"stage": "merge"},
        {"version": 2},
        {"contents": ("d",)},
        {"contents": ("c", "c")},
        {"lora__rank": "8"},
        {"data__max_length": "99"},
        {"data__template": "alpaca"},
        {"data__columns": "{ prompt = 'p' }"},
        {"bench__eval__0__limit": "5"},
        {"model__dtype": "float32"},
    ],
)
def test_what_goes_in_changes_the_id(id_of: Callable[..., str], change: dict):
    assert id_of(**change) != id_of()


@pytest.mark.parametrize(
    "change",
    [
        {"serve__port": "1"},
        {"name": "another"},
        {"model__id": "org/same-weights-elsewhere"},
        {"data__train": "moved.jsonl"},
        {"bench__eval__0__data": "moved.jsonl"},
    ],
)
def test_sections_that_are_not_read_and_paths_do_not(id_of: Callable[..., str], change: dict):
    assert id_of(**change) == id_of()


def test_data_is_known_by_its_bytes(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text("one")
    (tmp_path / "b.jsonl").write_text("two")
    both = data_sha256(f"{tmp_path}/*.jsonl")
    assert data_sha256("") == ""
    assert data_sha256(f"{tmp_path}/a.jsonl") != both
    (tmp_path / "a.jsonl").rename(tmp_path / "a2.jsonl")
    assert data_sha256(f"{tmp_path}/*.jsonl") == both
    (tmp_path / "b.jsonl").write_text("twO")
    assert data_sha256(f"{tmp_path}/*.jsonl") != both
    with pytest.raises(DataError):
        data_sha256(f"{tmp_path}/absent")
