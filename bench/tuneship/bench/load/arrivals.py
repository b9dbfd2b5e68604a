"""When requests leave: an absolute schedule, from a rate or from a recorded trace.

    schedule("poisson", rate=4, duration_s=30, seed=0)
    read_trace(Path("mooncake.jsonl"))

A trace is JSONL, one request a line: `timestamp` in milliseconds, as in Mooncake's traces
(https://github.com/kvcache-ai/Mooncake), with `input_length` and `output_length` in tokens, or `messages` to send.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, NamedTuple

from tuneship.bench.load.prompts import Messages, conversation, read_lines
from tuneship.core.errors import DataError
from tuneship.core.report import Arrivals


class Arrival(NamedTuple):
    """One line of a trace; None is what the line does not say."""

    at_s: float
    input_tokens: int | None = None
    output_tokens: int | None = None
    messages: Messages | None = None


def schedule(arrivals: Arrivals, rate: float, duration_s: float, seed: int = 0) -> list[float]:
    """Arrival times in seconds from the start, ascending, in [0, duration_s)."""
    if arrivals == "constant":
        count = max(1, int(rate * duration_s))
        return [index / rate for index in range(count)]
    gaps = random.Random(f"arrivals {seed} {rate}")
    times = [0.0]
    while (following := times[-1] + gaps.expovariate(rate)) < duration_s:
        times.append(following)
    return times


def read_trace(path: Path) -> list[Arrival]:
    """The arrivals that `path` recorded, in order of time, the first at 0.

    Raises:
        DataError: no such file, or a line that is no arrival; names file and line.

    """
    found = [_arrival(row, where) for where, row in read_lines(path)]
    start_s = min(arrival.at_s for arrival in found)
    return sorted((arrival._replace(at_s=arrival.at_s - start_s) for arrival in found), key=lambda one: one.at_s)


def _arrival(row: dict[str, Any], where: str) -> Arrival:
    at_ms = row.get("timestamp")
    if isinstance(at_ms, bool) or not isinstance(at_ms, int | float) or not 0 <= at_ms < float("inf"):
        raise DataError(f"{where}: timestamp is no time in milliseconds: {at_ms!r}")
    return Arrival(
        at_ms / 1e3,
        _length(row, "input_length", where),
        _length(row, "output_length", where),
        conversation(row, where) if "messages" in row else None,
    )


def _length(row: dict[str, Any], key: str, where: str) -> int | None:
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise DataError(f"{where}: {key} is no number of tokens: {value!r}")
    return value
