"""What to run where two servers could not be told apart: the same measurement, of more pairs or more items.

    again = Again("tuneship bench compare A B --task exact --data rows.jsonl", limit=200, pairs=12, asks=True)
    again.of_pairs(30)     # ... --limit 200 --pairs 30
    again.of_items(450)    # ... --limit 450 --pairs 12

Several such commands, which differ in these two alone, are one to who runs them (`decide`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

_AMOUNTS = re.compile(r"(?P<command>.+?)(?: --limit (?P<limit>\d+))? --pairs (?P<pairs>\d+)")


class Again(NamedTuple):
    """A measurement of two servers. `command` says all of it but its amounts."""

    command: str
    limit: int
    """Items or rows at most of what both are asked."""
    pairs: int
    asks: bool
    """Whether both are asked anything beside the load."""

    def of_pairs(self, needed: int) -> str:
        """The command with so many pairs of blocks."""
        return self._command(self.limit, needed)

    def of_items(self, needed: int) -> str:
        """The command with so many items or rows."""
        return self._command(needed, self.pairs)

    def _command(self, limit: int, pairs: int) -> str:
        return f"{self.command}{f' --limit {limit}' if self.asks else ''} --pairs {pairs}"


class Pace(NamedTuple):
    """How long what was just measured took."""

    pair_s: float
    """Seconds of a pair of blocks."""
    item_s: float = 0.0
    """Seconds of an item or row, asked of both."""

    def of(self, command: str) -> str:
        """What `command` will take, such as `about 12 min`."""
        found = _AMOUNTS.fullmatch(command)
        assert found, "a command of `Again`"
        return f"{_time(self.pair_s * int(found['pairs']) + self.item_s * int(found['limit'] or 0))}"


def is_command(step: str) -> bool:
    """Whether a next step is a command of `Again`, not words."""
    return bool(_AMOUNTS.fullmatch(step))


def decide(steps: Iterable[str]) -> list[str]:
    """Of `steps` the commands, each once: of those that differ in their amounts alone, one with the most of each."""
    most: dict[str, tuple[int, int]] = {}
    for step in steps:
        if found := _AMOUNTS.fullmatch(step):
            limit, pairs = most.get(found["command"], (0, 0))
            most[found["command"]] = max(limit, int(found["limit"] or 0)), max(pairs, int(found["pairs"]))
    return [Again(command, limit, pairs, asks=bool(limit)).of_pairs(pairs) for command, (limit, pairs) in most.items()]


def _time(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"about {seconds / length:.2g} {unit}"
    return f"about {max(seconds, 1):.0f} s"
