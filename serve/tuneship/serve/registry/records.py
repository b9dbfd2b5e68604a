"""What the registry knows: versions, the states that they pass through, and what happened to them."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

SHORT = 12
"""Hex digits of a content id in a version's name."""
COPIES = "adapters"
"""The folder beside a registry in which its versions' files lie."""


class State(StrEnum):
    """Where a version is: `checked -> loaded <-> canary -> live -> draining -> unloaded`."""

    CHECKED = "checked"
    """Fit to be served, and on its way into the engine."""
    LOADED = "loaded"
    """In the engine; answers whoever names it, and no share of its alias's requests."""
    CANARY = "canary"
    """Answers a share of its alias's requests."""
    LIVE = "live"
    """Answers what the canaries leave."""
    DRAINING = "draining"
    """Answers nobody new; its last requests are being finished."""
    UNLOADED = "unloaded"
    """Not in the engine, its files are gone."""


SERVED = frozenset({State.LOADED, State.CANARY, State.LIVE})
"""States in which a version may answer."""


class Version(NamedTuple):
    """One adapter under one alias. It never changes; its state does."""

    alias: str
    content_id: str
    base_id: str
    path: Path
    """The store's copy: what SGLang is given."""
    state: State
    weight: float
    """Its share of the alias's requests, 0..1; the live version has what the canaries leave."""
    generation: int
    """How many times it was loaded: the engine never sees one name twice."""
    pinned: bool
    verified: str
    """`""` (not yet), `passed`, `no evidence`, `cannot tell: ...`, `not asked` (nobody did), or `failed: ...`."""
    changed_at: str
    verified_under: str = ""
    """What the server was when that was found out: its weights, their type, its template. `""`: nobody knows."""

    @property
    def name(self) -> str:
        """Public and immutable, such as `sql@3fa9c1d20b77`."""
        return version_name(self.alias, self.content_id)

    @property
    def selector(self) -> str:
        """The adapter's name inside the engine, such as `sql@3fa9c1d20b77#1`."""
        return f"{self.name}#{self.generation}"

    @property
    def failed(self) -> bool:
        """Whether it was found to be another model than the one that was trained: it never gets weight."""
        return self.verified.startswith("failed")


class Event(NamedTuple):
    """One line of the history."""

    at: str
    actor: str
    verb: str
    alias: str
    version: str
    detail: str


def version_name(alias: str, content_id: str) -> str:
    """`alias@` and the first digits of the content id."""
    return f"{alias}@{content_id[:SHORT]}"
