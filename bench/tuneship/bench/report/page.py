"""`report.html`: one file to send to a colleague. Charts, their library and their data are inside; nothing is loaded.

What the page shows is decided here, how it looks in `templates/report.html.j2`. A Content-Security-Policy in the page
makes the browser refuse whatever would leave it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import altair as alt
import jinja2
import vl_convert

from tuneship.bench.report import charts, examples
from tuneship.bench.report.charts import Spec
from tuneship.bench.report.examples import Example
from tuneship.core.files import write_atomic
from tuneship.core.report import EvalResult, LoadResult, Report

_ECDFS = (("ttft_ms", "Time to first token"), ("itl_ms", "Inter-token latency"), ("e2e_ms", "End to end"))


class Tile(NamedTuple):
    """One headline figure; `before` is what it was with the base model."""

    label: str
    value: str
    unit: str
    note: str
    before: str = ""


class TaskRow(NamedTuple):
    """One line of the quality table."""

    name: str
    data: str
    base: EvalResult | None
    result: EvalResult | None
    examples: list[Example]

    @property
    def shown(self) -> EvalResult:
        """The result that the row is about."""
        shown = self.result or self.base
        assert shown is not None
        return shown

    @property
    def change(self) -> float | None:
        """Points won over the base."""
        return self.result.score - self.base.score if self.result and self.base else None


def write_html(report: Report, path: Path) -> None:
    """Write the page of `report` to `path`; items files are looked for relative to its folder."""
    html = render(report, path.parent)
    write_atomic(path, html.encode("utf-8", "replace").decode())  # a model may say half a surrogate pair


def render(report: Report, folder: Path) -> str:
    """The page as one string of HTML."""
    specs = _specs(report)
    page = _environment().get_template("report.html.j2")
    return page.render(
        report=report,
        tiles=_tiles(report),
        warnings=_warnings(report),
        tasks=_tasks(report, folder),
        rate_colors=list(zip(report.load, charts.ramp(len(report.load)), strict=True)),
        specs=specs,
        ecdfs=[name for name, _ in _ECDFS if name in specs],
        vega=_vega_bundle() if specs else "",
    )


@cache
def _vega_bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script (0.9 MB), from the wheel; seconds to build."""
    major, minor, _ = alt.SCHEMA_VERSION.split(".")  # "v6.4.1": what altair writes
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", f"{major}.{minor}")


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["ms"] = format_ms
    return environment


def format_ms(value: float | None) -> str:
    """Three figures: 4.37, 43.7, 437, 4,370."""
    if value is None:
        return "-"
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{digits}f}"


def _specs(report: Report) -> dict[str, Spec]:
    found: dict[str, Spec] = {}
    if report.training:
        found["loss"] = charts.loss_curve(report.training)
    for metric, title in _ECDFS:
        spec = charts.latency_ecdf(report.load, metric, title)
        if spec:
            found[metric] = spec
    return found


def _tiles(report: Report) -> list[Tile]:
    return [*_score_tiles(report), *_speed_tiles(report.load)]


def _score_tiles(report: Report) -> list[Tile]:
    tiles = []
    for row in _task_rows(report)[:1]:
        before = f"{row.base.score:.2f}" if row.base and row.result else ""
        note = f"{row.shown.items} items" + (", base to tuned" if before else "")
        tiles.append(Tile(f"{row.name} score", f"{row.shown.score:.2f}", "", note, before))
    return tiles


def _speed_tiles(levels: list[LoadResult]) -> list[Tile]:
    """At the highest rate that the server and the client both kept up with."""
    level = max(levels, key=lambda level: (level.client.valid and not level.errors, level.rate), default=None)
    if level is None:
        return []
    at = f"median at {level.rate:g} requests/s"
    return [
        Tile("TTFT", format_ms(level.ttft_ms.p50 if level.ttft_ms else None), "ms", at),
        Tile("TPOT", format_ms(level.tpot_ms.p50 if level.tpot_ms else None), "ms", at),
        Tile("Throughput", format_ms(level.output_tokens_per_s), "tok/s", f"output, at {level.rate:g} requests/s"),
    ]


def _warnings(report: Report) -> list[str]:
    """What a reader must know before believing the figures."""
    found = [
        f"At {level.rate:g}/s the load generator itself lagged by {level.client.lag_p99_ms:.1f} ms (p99): "
        "do not trust these latencies."
        for level in report.load
        if not level.client.valid
    ]
    found += [
        f"At {level.rate:g}/s {sum(level.errors.values())} of {level.requests} requests failed: "
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


def _tasks(report: Report, folder: Path) -> list[TaskRow]:
    return [
        row._replace(examples=examples.choose(row.base if row.result else None, row.shown, folder))
        for row in _task_rows(report)
    ]


def _task_rows(report: Report) -> list[TaskRow]:
    """Base and tuned (or other) results of the same task and data side by side."""
    by_key: dict[tuple[str, str], dict[str, Any]] = {}
    for result in report.eval:
        side = "base" if result.role == "base" else "result"
        by_key.setdefault((result.task, result.data), {})[side] = result
    return [
        TaskRow(task, Path(data).name, sides.get("base"), sides.get("result"), [])
        for (task, data), sides in by_key.items()
    ]
