"""What `GET /admin/status` says, and what happened between two of its answers.

A counter that fell was taken away and made anew in between: what it shows now is what happened.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field


class _Said(BaseModel):
    model_config = ConfigDict(frozen=True)


class EngineStatus(_Said):
    """`up_s` is 0 while it does not answer."""

    state: str
    pid: int = 0
    restarts: int = 0
    up_s: float = 0.0
    last_failure: str = ""


class SlotStatus(_Said):
    """As `slots.Pressure`; `total` is 0 where no adapters are served."""

    total: int = 0
    wanted: int = 0
    misses_per_minute: float = 0.0
    thrashing: bool = False


class VersionStatus(_Said):
    """One version of an alias."""

    alias: str
    version: str
    state: str
    weight: float = 0.0
    pinned: bool = False
    verified: str = ""
    in_flight: int = 0


class Histogram(_Said):
    """Seconds. `buckets` are (upper bound, values up to it); `count` also holds what is above the last."""

    buckets: tuple[tuple[float, int], ...] = ()
    count: int = 0

    def quantile(self, share: float) -> float:
        """The value that `share` of all do not pass, linear between two bounds; inf above the last, and of nothing."""
        rank = share * self.count
        low, below = 0.0, 0
        for bound, up_to in self.buckets:
            if up_to >= rank and up_to > below:
                return low + (bound - low) * max(rank - below, 0) / (up_to - below)
            low, below = bound, up_to
        return math.inf


class Counts(_Said):
    """Of one version: since it is served, or between two times."""

    requests: int = 0
    in_flight: int = 0
    """Now, whatever the times."""
    errors: Mapping[str, int] = Field(default_factory=dict)
    """{HTTP status: requests}; 499 are clients that left."""
    ttft_s: Histogram = Histogram()
    completion_tokens: int = 0
    chunks: int = 0
    """Of streams that say no `completion_tokens`: about one a token."""

    def since(self, before: Counts | None) -> Counts:
        """What came after `before`; all of it where there is none."""
        if before is None or self.requests < before.requests or self.ttft_s.count < before.ttft_s.count:
            return self
        errors = {status: count - before.errors.get(status, 0) for status, count in self.errors.items()}
        earlier = dict(before.ttft_s.buckets)
        return Counts(
            requests=self.requests - before.requests,
            in_flight=self.in_flight,
            errors={status: count for status, count in errors.items() if count > 0},
            ttft_s=Histogram(
                buckets=tuple((bound, up_to - earlier.get(bound, 0)) for bound, up_to in self.ttft_s.buckets),
                count=self.ttft_s.count - before.ttft_s.count,
            ),
            completion_tokens=self.completion_tokens - before.completion_tokens,
            chunks=self.chunks - before.chunks,
        )


class Status(_Said):
    """A server. `metrics` is {version: counts}, the base or a merged model among them."""

    engine: EngineStatus
    slots: SlotStatus = SlotStatus()
    in_flight: int = 0
    versions: tuple[VersionStatus, ...] = ()
    metrics: Mapping[str, Counts] = Field(default_factory=dict)
