"""Who may answer an alias, and when: what the verbs shall do, written down without asking who did it.

    timeline = Timeline({"ant": Alias(("ant@1",))}, at)
    planned = timeline.begin("ant", "promote", "ant@2", at=began)   # from now on either answers
    timeline.settle("ant", planned, at=ended)                       # from now on ant@2 alone
    timeline.allowed("ant", since, until)                           # of a request that was sent and begun between

The rules of `serve/tuneship/serve/registry/rules.py` in the terms of a client, for `never_wrong.py`: a verb that does
nothing is seen by the answers that come after it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from itertools import groupby
from typing import NamedTuple


class Alias(NamedTuple):
    """One alias: the versions that were live, the one that is live now last, and those that answer beside it."""

    lives: tuple[str, ...]
    canaries: frozenset[str] = frozenset()

    @property
    def answering(self) -> frozenset[str]:
        """Every version that may answer."""
        return self.canaries | set(self.lives[-1:])

    def after(self, verb: str, version: str = "", weight: float | None = None) -> Alias:
        """What it is once `verb` is done."""
        if verb == "rollback":
            return Alias(self.lives if self.canaries else self.lives[:-1])
        if verb == "unload":
            kept = tuple(name for name, _ in groupby(name for name in self.lives if name != version))
            return Alias(kept, self.canaries - {version})
        if verb == "promote" or weight == 1.0 or not self.lives:
            return Alias((*self.lives, version))
        return self._replace(canaries=self.canaries | {version}) if weight else self


class _Span(NamedTuple):
    """From `at` until the next one, these may answer."""

    at: float
    names: frozenset[str]


class Timeline:
    """Of every alias. Times are those of one clock, and come in order."""

    def __init__(self, now: Mapping[str, Alias], at: float) -> None:
        """Begin with what is served `now`."""
        self.now = dict(now)
        self._spans = {name: [_Span(at, alias.answering)] for name, alias in now.items()}

    def begin(self, name: str, verb: str, version: str = "", weight: float | None = None, *, at: float) -> Alias:
        """A verb is sent to the alias: both what was and what shall be may answer until it is settled."""
        planned = self.now[name].after(verb, version, weight)
        self._spans[name].append(_Span(at, self.now[name].answering | planned.answering))
        return planned

    def settle(self, name: str, alias: Alias, *, at: float) -> None:
        """The verb is over, and `alias` is what there is from now on."""
        self.now[name] = alias
        self._spans[name].append(_Span(at, alias.answering))

    def allowed(self, name: str, since: float, until: float) -> frozenset[str]:
        """Every version that may have been chosen for a request at one moment between `since` and `until`."""
        spans = self._spans[name]
        first = max(bisect_right(spans, since, key=lambda span: span.at) - 1, 0)
        last = bisect_right(spans, until, key=lambda span: span.at)
        return frozenset().union(*(span.names for span in spans[first : max(last, first + 1)]))
