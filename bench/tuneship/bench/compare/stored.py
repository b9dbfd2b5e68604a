"""Two stored reports, of which the candidate may be slower or worse than the baseline.

Each side was measured once, at another time, so blocks within a run say too little: what moves a server from one run
to the next is in none of them. That noise comes from the testbed's calibration (`calibration.py`); a testbed without
one is taken to be very noisy, and then only what is far apart can be told. Items of tasks are paired.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from scipy import stats  # type: ignore[import-untyped]

from tuneship.bench.compare.calibration import Calibration, Noise, load_key
from tuneship.bench.compare.metrics import LOAD_METRICS, Metric
from tuneship.bench.compare.quality import Side, weigh_nll, weigh_scores
from tuneship.bench.compare.statistics import POWER
from tuneship.bench.compare.verdict import Evidence
from tuneship.bench.counterparts import counterpart
from tuneship.bench.testbed import differences
from tuneship.core.errors import EndpointError
from tuneship.core.report import LoadResult, Report

MIN_REQUESTS = 20
ASSUMED = Noise(sd=0.15, df=1000)
"""Of a log-ratio of two runs where nothing was measured: wide on purpose, so that only what is plain is told."""


class Stored(NamedTuple):
    """A report and the file that it was read from."""

    report: Report
    file: Path

    @property
    def folder(self) -> Path:
        """What its items files are named from."""
        return self.file.parent


class Margins(NamedTuple):
    """What is still as good."""

    latency: float = 0.05
    """A share of the baseline's latency or throughput."""
    quality: float = 0.02
    """Points of score in 0..1."""
    nll: float = 0.02
    """Nats per token."""


def weigh(
    baseline: Stored,
    candidate: Stored,
    margins: Margins,
    calibration: Calibration,
    alpha: float = 0.05,
    *,
    allow_different_testbeds: bool = False,
) -> list[Evidence]:
    """What can be said of every metric of every load level, task and held-out file that `baseline` has.

    Raises:
        EndpointError: measured on different testbeds (names what differs), or the baseline has nothing to compare.

    """
    a, b = baseline.report, candidate.report
    apart = differences(a.testbed, b.testbed)
    if apart and not allow_different_testbeds:
        raise EndpointError(
            f"the reports were measured on different testbeds: {'; '.join(apart)}",
            hint="measure both on the same machine, or --allow-different-testbeds",
        )
    found = list(_weigh_load(a.load, b.load, margins.latency, calibration, alpha))
    for task in a.eval:
        other = counterpart(task, a.eval, b.eval)
        side = Side(other, candidate.folder) if other else None
        found.append(weigh_scores(Side(task, baseline.folder), side, margins.quality, alpha))
    for rows in a.nll:
        scored = counterpart(rows, a.nll, b.nll)
        nll_side = Side(scored, candidate.folder) if scored else None
        found.append(weigh_nll(Side(rows, baseline.folder), nll_side, margins.nll, alpha))
    if not found:
        raise EndpointError("the baseline has no load level, no task and no held-out text to compare")
    return found


def _weigh_load(
    baseline: Sequence[LoadResult],
    candidate: Sequence[LoadResult],
    margin: float,
    calibration: Calibration,
    alpha: float,
) -> Iterator[Evidence]:
    for a in baseline:
        b = counterpart(a, baseline, candidate)
        doubt = "the candidate was not measured so" if b is None else _thin(a, "baseline") or _thin(b, "candidate")
        for metric in LOAD_METRICS:
            name = f"{a.arrivals} {a.offered} {metric.name}"
            value_a, value_b, effect = metric.value(a), metric.value(b), metric.log_ratio(a, b)
            if doubt or effect is None or b is None:
                yield Evidence(name, value_a, value_b, margin, doubt=doubt or "one side has no figure")
                continue
            measured = calibration.run_noise(load_key(a), metric.field)
            within = _block_noise(metric, a, b)
            noise = max(measured or ASSUMED, Noise(within, ASSUMED.df))
            yield _weigh_run(Evidence(name, value_a, value_b, margin), effect, noise, alpha, calibrated=bool(measured))


def _weigh_run(named: Evidence, effect: float, noise: Noise, alpha: float, *, calibrated: bool) -> Evidence:
    """A log-ratio against the noise of such log-ratios, by Student's t."""
    least = max(noise.sd, 1e-6)
    reach = float(stats.t.ppf(1 - alpha, noise.df)) * least
    return named._replace(
        worse_by=math.expm1(effect),
        lower=math.expm1(effect - reach),
        upper=math.expm1(effect + reach),
        p=float(stats.t.sf(effect / least, noise.df)),
        pairs=1,
        detectable=math.expm1(float(stats.t.ppf([1 - alpha, POWER], noise.df).sum()) * least),
        next_step="compare the two servers, which are then measured in turn"
        if calibrated
        else "tuneship bench calibrate: how far two runs of this testbed differ is not known",
    )


def _block_noise(metric: Metric, a: LoadResult, b: LoadResult) -> float:
    """Standard error of the mean log-ratio of blocks that had the same arrivals; 0 where there are no such blocks."""
    if len(a.blocks) != len(b.blocks) or len(a.blocks) < 2:
        return 0.0
    found = (metric.log_ratio(x, y) for x, y in zip(a.blocks, b.blocks, strict=True))
    ratios = [ratio for ratio in found if ratio is not None]
    return statistics.stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else 0.0


def _thin(level: LoadResult, name: str) -> str:
    """Why a level says nothing; empty when it does."""
    if level.errors:
        return f"the {name} has errors"
    if not level.client.valid:
        return f"the {name}'s client was the bottleneck"
    few = level.completed < MIN_REQUESTS
    return f"the {name} has {level.completed} requests, {MIN_REQUESTS} are needed" if few else ""
