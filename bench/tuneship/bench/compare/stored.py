"""Is the candidate slower or worse than the baseline? Plain thresholds on two stored reports.

Latency metrics and throughput are compared as ratios, scores as differences. One measurement a side says nothing about
noise, so what is thin (few requests, errors, a client that was the bottleneck) is "cannot tell" and never a pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Literal, NamedTuple

from tuneship.bench.testbed import differences
from tuneship.core.errors import EndpointError
from tuneship.core.report import Comparison, EvalResult, LoadResult, Report

MIN_REQUESTS = 20

_Measured = LoadResult | EvalResult


class Margins(NamedTuple):
    """What is still as good: a share of the baseline's latency, and points of score in 0..1."""

    latency: float = 0.05
    quality: float = 0.02


class _Metric(NamedTuple):
    name: str
    path: str
    higher_is_better: bool = False


_LOAD_METRICS = (
    _Metric("TTFT p50 ms", "ttft_ms.p50"),
    _Metric("TPOT p50 ms", "tpot_ms.p50"),
    _Metric("E2E p50 ms", "e2e_ms.p50"),
    _Metric("output tokens/s", "output_tokens_per_s", higher_is_better=True),
)


def compare(
    baseline: Report, candidate: Report, margins: Margins, *, allow_different_testbeds: bool = False
) -> list[Comparison]:
    """Every metric of every load level and task that `baseline` has.

    Raises:
        EndpointError: measured on different testbeds (names what differs), or the baseline has nothing to compare.

    """
    apart = differences(baseline.testbed, candidate.testbed)
    if apart and not allow_different_testbeds:
        raise EndpointError(
            f"the reports were measured on different testbeds: {'; '.join(apart)}",
            hint="measure both on the same machine, or --allow-different-testbeds",
        )
    found = [*_compare_load(baseline, candidate, margins), *_compare_evals(baseline, candidate, margins)]
    if not found:
        raise EndpointError("the baseline has no load level and no task to compare")
    return found


def _compare_load(baseline: Report, candidate: Report, margins: Margins) -> Iterator[Comparison]:
    for a in baseline.load:
        b = _same_level(a, baseline.load, candidate.load)
        doubt = _doubt(a, b)
        for metric in _LOAD_METRICS:
            yield _by_ratio(f"{a.arrivals} {a.offered} {metric.name}", metric, a, b, margins.latency, doubt)


def _compare_evals(baseline: Report, candidate: Report, margins: Margins) -> Iterator[Comparison]:
    for a in baseline.eval:
        b = next((b for b in candidate.eval if _eval_key(b) == _eval_key(a)), None)
        yield _by_difference(f"{a.task} {Path(a.data).name} ({a.role})", a, b, margins.quality, _doubt(a, b))


def _same_level(a: LoadResult, among: Sequence[LoadResult], others: Sequence[LoadResult]) -> LoadResult | None:
    """The candidate's level with the same load; by the model's name as well when one side measured several models."""
    here = [level for level in among if _load_key(level) == _load_key(a)]
    there = [level for level in others if _load_key(level) == _load_key(a)]
    if len(here) > 1 or len(there) > 1:
        there = [level for level in there if level.model == a.model]
    return there[0] if there else None


def _load_key(level: LoadResult) -> tuple[str, str, float, int]:
    return level.workload, level.arrivals, level.rate, level.concurrency


def _eval_key(result: EvalResult) -> tuple[str, str, str]:
    return result.task, Path(result.data).name, result.role


def _doubt(a: _Measured, b: _Measured | None) -> str:
    """Why these two say nothing about each other; empty when they do."""
    if b is None:
        return "the candidate was not measured so"
    return _thin(a, "baseline") or _thin(b, "candidate")


def _thin(side: _Measured, name: str) -> str:
    if side.errors:
        return f"the {name} has errors"
    if isinstance(side, LoadResult) and not side.client.valid:
        return f"the {name}'s client was the bottleneck"
    count = side.completed if isinstance(side, LoadResult) else side.items
    return f"the {name} has {count} requests, {MIN_REQUESTS} are needed" if count < MIN_REQUESTS else ""


def _by_ratio(name: str, metric: _Metric, a: LoadResult, b: LoadResult | None, margin: float, doubt: str) -> Comparison:
    value_a, value_b = _value(a, metric.path), _value(b, metric.path)
    if not value_a or not value_b:
        return _undecided(name, value_a, value_b, doubt or "one side has no figure")
    ratio = value_b / value_a
    if doubt:
        return _undecided(name, value_a, value_b, doubt)
    worse_by = 1 - ratio if metric.higher_is_better else ratio - 1
    return Comparison(metric=name, a=value_a, b=value_b, ratio=ratio, verdict=_verdict(worse_by, margin))


def _by_difference(name: str, a: EvalResult, b: EvalResult | None, margin: float, doubt: str) -> Comparison:
    if b is None or doubt:
        return _undecided(name, a.score, b.score if b else None, doubt)
    ratio = b.score / a.score if a.score else None
    return Comparison(metric=name, a=a.score, b=b.score, ratio=ratio, verdict=_verdict(a.score - b.score, margin))


def _verdict(worse_by: float, margin: float) -> Literal["regressed", "no worse than the margin"]:
    # A difference of exactly the margin is within it, whatever binary fractions make of 0.90 - 0.88.
    return "regressed" if worse_by > margin + 1e-9 else "no worse than the margin"


def _undecided(name: str, a: float | None, b: float | None, reason: str) -> Comparison:
    ratio = b / a if a and b is not None else None
    return Comparison(metric=name, a=a, b=b, ratio=ratio, verdict="cannot tell", reason=reason)


def _value(level: LoadResult | None, path: str) -> float | None:
    """`attrgetter` that stops at what was not measured."""
    try:
        return float(attrgetter(path)(level))
    except AttributeError:
        return None
