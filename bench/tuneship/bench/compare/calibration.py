"""How noisy a testbed is: figures of the same thing measured again and again, kept per testbed in the cache.

    calibration = read_calibration(testbed)
    calibration.pair_noise(load, "ttft_ms")   # of two blocks measured in turn: what a live comparison rests on
    calibration.run_noise(load, "ttft_ms")    # of two runs at different times: what two stored reports rest on

Each measurement adds to the file and is kept as it was; every noise is derived from them. Restarts of the server are in
the noise only if some measurements were taken before one and some after.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from tuneship.bench.compare.metrics import LOAD_METRICS
from tuneship.core import versioned
from tuneship.core.cache import cache_dir
from tuneship.core.errors import EndpointError
from tuneship.core.files import write_atomic
from tuneship.core.report import LoadResult, Testbed

SCHEMA = 1
FEWEST = 4
"""Measurements, or pairs, below which a deviation says nothing."""


class Noise(NamedTuple):
    """Standard deviation of a log-ratio of two measurements of the same thing."""

    sd: float
    df: int
    """Degrees of freedom that `sd` was estimated with."""


class Measurement(BaseModel):
    """One level of load, measured once."""

    model_config = ConfigDict(frozen=True)

    load: str
    """See `load_key`."""
    at: str
    """When, in UTC; a report that is given twice counts once."""
    order: int = 0
    """Of a block, in its series of pairs: 0 and 1 are the first pair."""
    paired: bool = False
    """Whether it is a block of a series, or a level of a report."""
    values: dict[str, float]
    """By the fields of `LOAD_METRICS`."""


class Calibration(BaseModel):
    """All measurements of the same thing on one testbed."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    schema_: int = Field(default=SCHEMA, alias="schema")
    testbed: Testbed
    measurements: tuple[Measurement, ...] = ()

    def pair_noise(self, load: str, field: str) -> Noise | None:
        """Of one pair's log-ratio; None with too few pairs."""
        ratios: list[float] = []
        series = [m for m in self.measurements if m.load == load and m.paired and field in m.values]
        by_place = {(m.at, m.order): m.values[field] for m in series}
        for (at, order), value in by_place.items():
            if order % 2 == 0 and (other := by_place.get((at, order + 1))):
                ratios.append(math.log(other / value))
        return Noise(statistics.stdev(ratios), len(ratios) - 1) if len(ratios) >= FEWEST else None

    def run_noise(self, load: str, field: str) -> Noise | None:
        """Of the log-ratio of two runs at any two times; None with too few measurements."""
        logs = [math.log(m.values[field]) for m in self.measurements if m.load == load and field in m.values]
        if len(logs) < FEWEST:
            return None
        return Noise(math.sqrt(2) * statistics.stdev(logs), len(logs) - 1)

    def loads(self) -> list[str]:
        """Every load that was measured, in the order in which it first was."""
        return list(dict.fromkeys(m.load for m in self.measurements))


def load_key(level: LoadResult) -> str:
    """What makes two measurements of one testbed repetitions of each other: workload, load and length; no model."""
    length_s = level.window_s[1] - level.window_s[0] if level.window_s else level.duration_s
    return f"{level.workload}, {level.arrivals} {level.offered}, {length_s:g} s"


def measurement(level: LoadResult, at: str, order: int | None = None) -> Measurement | None:
    """Of a level, or of the block `order` of a series; None where it says nothing: errors, or a client that lagged."""
    if level.errors or not level.client.valid:
        return None
    values = {metric.field: value for metric in LOAD_METRICS if (value := metric.value(level))}
    paired = order is not None
    return Measurement(load=load_key(level), at=at, order=order or 0, paired=paired, values=values)


def calibration_file(testbed: Testbed) -> Path:
    """Where the calibration of `testbed` lies, whether or not there is one."""
    return cache_dir() / "calibration" / f"{testbed.digest}.json"


def read_calibration(testbed: Testbed) -> Calibration:
    """What is known of `testbed`; an empty calibration when that is nothing.

    Raises:
        EndpointError: a file that is no calibration.

    """
    file = calibration_file(testbed)
    if not file.is_file():
        return Calibration(testbed=testbed)
    return versioned.parse(Calibration, file.read_bytes(), file, SCHEMA, EndpointError)


def add_measurements(testbed: Testbed, found: Sequence[Measurement]) -> Calibration:
    """Add to what is known of `testbed`, and write it."""
    known = read_calibration(testbed)
    new = [one for one in found if one not in known.measurements]
    whole = known.model_copy(update={"measurements": (*known.measurements, *new)})
    file = calibration_file(testbed)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, whole.model_dump_json(indent=1, by_alias=True))
    return whole
