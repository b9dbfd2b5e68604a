"""What the three tasks share: splits that have nothing in common, and rows."""

from __future__ import annotations

import random
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

Split = Literal["train", "heldout"]
Item = TypeVar("Item")

_NAMES: dict[str, str] = tomllib.loads(Path(__file__).with_name("names.toml").read_text(encoding="utf-8"))

SIZES: dict[Split, int] = {"train": 640, "heldout": 200}


class Example(NamedTuple):
    """One question and its answer. `values` are the open values in it: held-out rows use none of train's."""

    user: str
    answer: str
    template: str
    values: tuple[str, ...]
    schema: str = ""


class Task(NamedTuple):
    """A data set: its name, the system prompt of every row, and how to draw one example."""

    name: str
    system: str
    draw: Callable[[Split, random.Random], Example]


def rows(task: Task, split: Split) -> Iterator[dict[str, Any]]:
    """`SIZES[split]` rows, no two with the same user message, the same in every run."""
    rng = random.Random(f"{task.name}/{split}")
    seen: set[str] = set()
    while len(seen) < SIZES[split]:
        example = task.draw(split, rng)
        if example.user in seen:
            continue
        seen.add(example.user)
        yield {
            "messages": [
                {"role": "system", "content": task.system},
                {"role": "user", "content": example.user},
                {"role": "assistant", "content": example.answer},
            ],
            "template": example.template,
            "values": list(example.values),
            **({"schema": example.schema} if example.schema else {}),
        }


def divide(pool: Sequence[Item], seed: str, heldout_share: float = 0.25) -> dict[Split, list[Item]]:
    """The pool in two parts that share nothing."""
    shuffled = list(pool)
    random.Random(seed).shuffle(shuffled)
    cut = round(len(shuffled) * heldout_share)
    return {"heldout": shuffled[:cut], "train": shuffled[cut:]}


def names(pool: str) -> dict[Split, list[str]]:
    """The words of `names.toml` under `pool`, divided."""
    return divide(_NAMES[pool].split(), pool)


def pick(templates: Sequence[str], prefix: str, rng: random.Random) -> tuple[str, str]:
    """(id, text) of one of the templates."""
    number = rng.randrange(len(templates))
    return f"{prefix}{number:02d}", templates[number]
