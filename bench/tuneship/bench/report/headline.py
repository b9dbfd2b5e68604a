"""What a reader sees first: the headline figures, and why not to believe them."""

from __future__ import annotations

from typing import NamedTuple

from tuneship.bench.report.quality import nll_rows, pair_up
from tuneship.core.report import LoadResult, Report


class Tile(NamedTuple):
    """One headline figure; `before` is what it was with the base model."""

    label: str
    value: str
    unit: str
    note: str
    before: str = ""


def best_level(report: Report) -> LoadResult | None:
    """The heaviest level that server and client both kept up with; closed loops have no rate but a concurrency."""

    def rank(level: LoadResult) -> tuple[bool, float, int]:
        beyond = report.knee is not None and level.rate > report.knee.rate
        return level.client.valid and not level.errors and not beyond, level.rate, level.concurrency

    return max(report.load, key=rank, default=None)


def tiles(report: Report) -> list[Tile]:
    """The headline: quality, then speed."""
    return [*(_score_tiles(report) or _nll_tiles(report)), *_speed_tiles(report)]


def _score_tiles(report: Report) -> list[Tile]:
    found = []
    for row in pair_up(report)[:1]:
        before = f"{row.base.score:.2f}" if row.base and row.result else ""
        note = f"{row.shown.items} items" + (", base to tuned" if before else "")
        found.append(Tile(f"{row.name} score", f"{row.shown.score:.2f}", "", note, before))
    return found


def _nll_tiles(report: Report) -> list[Tile]:
    """What stands for quality where no task was scored."""
    shown = next((row for row in nll_rows(report) if row.result.role != "base"), None)
    if shown is None:
        return []
    result = shown.result
    before = f"{result.nll - shown.change:.3f}" if shown.change is not None else ""
    note = f"nats a token, {result.rows} rows" + (", base to tuned" if before else "")
    return [Tile("Held-out NLL", f"{result.nll:.3f}", "", note, before)]


def _speed_tiles(report: Report) -> list[Tile]:
    level = best_level(report)
    if level is None:
        return []
    at = f"median at {level.offered}"
    found = [
        Tile("TTFT", format_ms(level.ttft_ms.p50 if level.ttft_ms else None), "ms", at),
        Tile("TPOT", format_ms(level.tpot_ms.p50 if level.tpot_ms else None), "ms", at),
        Tile("Throughput", format_ms(level.output_tokens_per_s), "tok/s", f"output, at {level.offered}"),
    ]
    if level.goodput is not None:
        found.append(Tile("Goodput", f"{level.goodput:.0%}", "", f"of requests sent, at {level.offered}"))
    return found


def warnings(report: Report) -> list[str]:
    """What a reader must know before believing the figures."""
    found = [
        f"At {level.offered} the load generator itself lagged by {level.client.lag_p99_ms:.1f} ms (p99): "
        "do not trust these latencies."
        for level in report.load
        if not level.client.valid
    ]
    found += [
        f"At {level.offered} {sum(level.errors.values())} of {level.requests} requests failed: "
        + ", ".join(f"{count} {kind}" for kind, count in sorted(level.errors.items()))
        + "."
        for level in report.load
        if level.errors
    ]
    found += [
        f"{r.errors} of {r.items} items of {r.task} ({r.role}) failed and count as 0." for r in report.eval if r.errors
    ]
    if report.parity and not report.parity.passed:
        found.append(
            "The merged model was over the parity limit" + (" and was forced." if report.parity.forced else ".")
        )
    return found


def format_ms(value: float | None) -> str:
    """Three figures: 4.37, 43.7, 437, 4,370."""
    if value is None:
        return "-"
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{digits}f}"


def format_figure(value: float | None) -> str:
    """A figure of unknown kind: counts as they are, others in three figures."""
    return f"{value:,.0f}" if value is not None and float(value).is_integer() else format_ms(value)
