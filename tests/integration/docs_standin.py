"""A stand-in for the checkout and its bundled model, in which the pages' commands take seconds instead of minutes.

    standin = build(Path("recipes"), Path("/tmp/walk"))
    standin.folder       # recipes/ under their own names: fewer rows, another number of steps, short measurements
    standin.environment  # where tuneship finds a tiny model under the name of the one that comes with it

The model has two layers and a tokenizer that was made from the rows, so that it can learn them.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w

from tests import tiny_llama
from tuneship.core import model_source
from tuneship.core.cache import cache_dir

RECIPES = ("quickstart", "triage", "sql")
TRAIN_ROWS, HELDOUT_ROWS = 64, 16
CHANGED: Mapping[str, Mapping[str, Any]] = {
    "train": {"steps": 40, "learning_rate": 1e-2, "optimizer": "adamw", "effective_batch": 4},
    # Random weights lose much in four bits; what is refused, and why, has tests of its own.
    "merge": {"max_nll_increase": 2.0},
}
LOAD = {"rates": [4], "duration_s": 2, "input_tokens": 16, "output_tokens": 8}
EVAL = {"limit": 8, "max_tokens": 24}


class StandIn(NamedTuple):
    """A folder to run commands in, and what their environment must hold."""

    folder: Path
    environment: dict[str, str]


def build(recipes: Path, at: Path) -> StandIn:
    """Write recipes and rows like those of `recipes` under `at`, and a cache with a tiny model as the bundled one."""
    folder, cache = at / "checkout", at / "cache"
    (folder / "recipes" / "data").mkdir(parents=True)
    texts: list[str] = []
    for name in RECIPES:
        recipe = tomllib.loads((recipes / f"{name}.toml").read_text(encoding="utf-8"))
        for split, count in (("train", TRAIN_ROWS), ("heldout", HELDOUT_ROWS)):
            rows = (recipes / recipe["data"][split]).read_text(encoding="utf-8").splitlines(keepends=True)
            (folder / "recipes" / recipe["data"][split]).write_text("".join(rows[:count]), encoding="utf-8")
            texts += rows
        (folder / "recipes" / f"{name}.toml").write_text(tomli_w.dumps(_quick(recipe)), encoding="utf-8")
    model = cache / "models" / model_source.bundled_path().name
    tiny_llama.write(model, texts, words=1024, dtype="bfloat16")  # as models are published
    _share_bytecode(cache)
    return StandIn(folder, {"TUNESHIP_CACHE": str(cache)})


def _quick(recipe: dict[str, Any]) -> dict[str, Any]:
    for section, values in CHANGED.items():
        recipe[section] = recipe.get(section, {}) | values
    recipe["bench"]["load"] |= LOAD
    recipe["bench"]["eval"] = [task | EVAL for task in recipe["bench"]["eval"]]
    return recipe


def _share_bytecode(cache: Path) -> None:
    """SGLang's compiled modules, which take a minute to make, are those of the user."""
    bytecode = cache_dir() / "bytecode"
    bytecode.mkdir(exist_ok=True)
    (cache / "bytecode").symlink_to(bytecode)
