"""How SGLang's adapter slots fare: which versions want one, how often weights are copied, and whether it thrashes.

    slots = Slots(total=max_loras + 1)
    slots.serving({"sql@3fa9": False, "sum@1c2d": True})    # {version: pinned}, with every change
    slots.asked("sql@3fa9")                                 # with every request; None is the base
    slots.pressure()

SGLang (`lora/mem_pool.py`, `eviction_policy.py`) keeps the weights of `total` models ready for a batch. One place is
the base's: it is filled at the start and given up only when nothing else can be. An adapter that has no place gets that
of the least recently used one that is neither pinned nor in the batch, and its weights are copied there while the batch
waits. More adapters than places are fine as long as few requests meet that.

The engine says nothing of it: `sglang:lora_pool_slots_used` is how many different adapters run at this moment (what is
kept and idle does not count, nor does the base), `..._slots_total` is `total`. So the same LRU is kept here, of one
request after the other. It is an estimate: a batch keeps all its adapters and a long answer keeps its own in use, which
saves copies; an adapter that runs while another one's prompt is read can lose its place and come back, which adds some.
"""

from __future__ import annotations

import math
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from tuneship.core.progress import say

WINDOW_S = 60.0
_WARN_EVERY_S = 300.0
_SHARE = 0.1
"""Of requests that wait for weights that were there a minute ago. From a tenth on, they are what p90 of TTFT shows."""
_RETURNS = 6
"""Such requests in a window. Fewer are nobody's trouble, whatever their share."""


class Pressure(NamedTuple):
    """The last minute. Slots count the base's; misses are requests that wait for a copy."""

    total: int
    wanted: int
    requests_per_minute: float = 0.0
    misses_per_minute: float = 0.0
    thrashing: bool = False
    """At least a tenth of the requests, and 6 a minute, wait for weights that more slots would have kept."""


class Hot(NamedTuple):
    """A version worth pinning."""

    version: str
    share: float
    """Of the last minute's requests, 0 to 1."""


class _Asked(NamedTuple):
    at: float
    version: str | None
    missed: bool
    returned: bool
    """Missed though it was asked for less than a window ago: not a first time, which no slot would have saved."""


class Slots:
    """An engine's slots as they should look from what was asked. `total` is SGLang's `--max-loras-per-batch`."""

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._total = total
        self._clock = clock
        self._pinned: dict[str, bool] = {}
        self._resident: OrderedDict[str, None] = OrderedDict()  # least recently used first; the base has its own place
        self._base_resident = True
        self._window: deque[_Asked] = deque()
        self._requests: Counter[str | None] = Counter()
        self._misses = self._returns = 0
        self._warned_at = -math.inf

    def serving(self, pinned: Mapping[str, bool]) -> None:
        """These are in the engine, pinned or not; of others the places are free.

        A new one takes a place at once: whoever loads it asks it for a token.
        """
        new = [version for version in pinned if version not in self._pinned]
        self._pinned = dict(pinned)
        for version in [version for version in self._resident if version not in pinned]:
            del self._resident[version]
        for version in new:
            self._take(version)

    def restarted(self) -> None:
        """A new engine, which was asked for a token of everything that is served."""
        self._resident.clear()
        self._base_resident = True
        for version in self._pinned:
            self._take(version)

    def asked(self, version: str | None) -> bool:
        """A request for `version` (None: the base) begins; whether it waits for a copy. Warns when it thrashes."""
        self._forget()
        missed = self._take(version)
        returned = missed and version in self._requests
        self._window.append(_Asked(self._clock(), version, missed, returned))
        self._requests[version] += 1
        self._misses += missed
        self._returns += returned
        if returned:
            self._warn()
        return missed

    def pressure(self) -> Pressure:
        """How the last minute was. What is pinned wants its place also when nobody asks."""
        self._forget()
        asked = {version for version in self._requests if version in self._pinned}
        wanted = 1 + len(asked | {version for version, pinned in self._pinned.items() if pinned})
        requests, per_minute = len(self._window), 60.0 / WINDOW_S
        thrashing = self._returns >= max(_RETURNS, _SHARE * requests)
        return Pressure(self._total, wanted, requests * per_minute, self._misses * per_minute, thrashing)

    def hot(self, versions: Iterable[str]) -> tuple[Hot, ...]:
        """Which of `versions` to pin, most asked first; none while all of them fit.

        Requests that come independently miss least when the most asked adapters stay. One place must be left for the
        others to take turns in, and one for the base.
        """
        if self.pressure().wanted <= self._total:
            return ()
        requests = max(len(self._window), 1)
        shares = (Hot(version, self._requests[version] / requests) for version in versions)
        ranked = sorted((hot for hot in shares if hot.share), key=lambda hot: (-hot.share, hot.version))
        return tuple(ranked[: max(self._total - 2, 0)])

    def _take(self, version: str | None) -> bool:
        """Give it a place, as SGLang's `prepare_lora_batch` does for a batch of this one; whether it had none."""
        if version is None:
            missed, self._base_resident = not self._base_resident, True
            if missed:
                self._evict(len(self._resident) + 1)
            return missed
        missed = version not in self._resident
        if missed:
            self._evict(len(self._resident) + self._base_resident + 1)
        self._resident[version] = None
        self._resident.move_to_end(version)
        return missed

    def _evict(self, needed: int) -> None:
        if needed <= self._total:
            return
        victim = next((version for version in self._resident if not self._pinned.get(version)), None)
        if victim is not None:
            del self._resident[victim]
        else:
            self._base_resident = False

    def _forget(self) -> None:
        """Drop what is older than the window."""
        oldest = self._clock() - WINDOW_S
        while self._window and self._window[0].at <= oldest:
            gone = self._window.popleft()
            self._misses -= gone.missed
            self._returns -= gone.returned
            self._requests[gone.version] -= 1
            if not self._requests[gone.version]:
                del self._requests[gone.version]

    def _warn(self) -> None:
        pressure, now = self.pressure(), self._clock()
        if not pressure.thrashing or now - self._warned_at < _WARN_EVERY_S:
            return
        self._warned_at = now
        hot = ", ".join(f"{version} ({share:.0%} of requests)" for version, share in self.hot(self._pinned))
        adapters, (_, _, requests, misses, _) = pressure.wanted - 1, pressure
        say(
            f"warning: {adapters} adapters take turns in {self._total - 1} slots: about {misses:.0f} of {requests:.0f} "
            f"requests a minute wait for weights; restart with --max-loras {adapters}"
            + (f", or pin {hot}" if hot else "")
        )
