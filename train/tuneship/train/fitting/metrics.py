"""metrics.jsonl: a line a step, each step once, also when a training was resumed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from tuneship.core.files import write_atomic

FILE = "metrics.jsonl"
HELDOUT_NLL = "heldout_nll"


def append(attempt: Path, record: dict[str, Any]) -> None:
    """One more line; JSON has no NaN, so a value that is no number is null."""
    known = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }
    with (attempt / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(known) + "\n")


def column(attempt: Path, key: str) -> list[tuple[int, float]]:
    """(step, value) of the lines that have `key`."""
    lines = (attempt / FILE).read_text(encoding="utf-8").splitlines() if (attempt / FILE).exists() else []
    return [(record["step"], record[key]) for record in map(json.loads, lines) if record.get(key) is not None]


def carry_over(before: Path, attempt: Path, step: int) -> None:
    """Begin `attempt`'s file with what `before` logged up to `step`: what came later is done again."""
    lines = (before / FILE).read_text(encoding="utf-8").splitlines() if (before / FILE).exists() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    write_atomic(attempt / FILE, "".join(f"{line}\n" for line in kept))
