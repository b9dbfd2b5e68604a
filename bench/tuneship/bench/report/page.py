"""`report.html`: one file to send to a colleague. Charts, their library and their data are inside; nothing is loaded.

What the page shows is decided here, how it looks in `templates/report.html.j2`. A Content-Security-Policy in the page
makes the browser refuse whatever would leave it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import altair as alt
import jinja2
import vl_convert

from tuneship.bench.report import charts, headline
from tuneship.bench.report.charts import Spec
from tuneship.bench.report.comparison import common_tasks
from tuneship.bench.report.headline import format_figure, format_ms
from tuneship.bench.report.history import HistoryRow
from tuneship.bench.report.quality import nll_rows, task_rows
from tuneship.bench.testbed import differences
from tuneship.core.files import write_atomic
from tuneship.core.report import Comparison, Report

_OVER_TIME: tuple[tuple[Literal["ttft_ms", "e2e_ms"], str], ...] = (
    ("ttft_ms", "Time to first token"),
    ("e2e_ms", "End to end"),
)
_HISTORY = (
    ("score", "Score of the first eval"),
    ("ttft_ms", "TTFT p50, milliseconds"),
    ("tpot_ms", "TPOT p50, milliseconds"),
    ("tokens_per_s", "Output tokens/s"),
)
_ECDFS = (("ttft_ms", "Time to first token"), ("itl_ms", "Inter-token latency"), ("e2e_ms", "End to end"))


def write_html(report: Report, path: Path) -> None:
    """Write the page of `report` to `path`; items files are looked for relative to its folder."""
    html = render(report, path.parent)
    write_atomic(path, html.encode("utf-8", "replace").decode())  # a model may say half a surrogate pair


def render(report: Report, folder: Path) -> str:
    """The page as one string of HTML."""
    return _render(
        "report.html.j2",
        _specs(report),
        report=report,
        comparison=report.comparison,
        tiles=headline.tiles(report),
        warnings=headline.warnings(report),
        tasks=task_rows(report, folder),
        nlls=nll_rows(report),
        level_colors=list(zip(report.load, charts.ramp(len(report.load)), strict=True)),
        adapter_columns=_adapter_columns(report),
        has_goodput=any(level.goodput is not None for level in report.load),
        slos={name: limit for level in report.load for name, limit in level.slo_ms.items()},
        engine_names=list(dict.fromkeys(name for level in report.load for name in level.engine)),
    )


def write_comparison_html(
    rows: Sequence[Comparison], baseline: tuple[Report, Path], candidate: tuple[Report, Path], path: Path
) -> None:
    """Write the page of `tuneship bench compare` of two stored reports, each with the file that it was read from."""
    html = render_comparison(rows, baseline, candidate)
    write_atomic(path, html.encode("utf-8", "replace").decode())


def render_comparison(rows: Sequence[Comparison], baseline: tuple[Report, Path], candidate: tuple[Report, Path]) -> str:
    """The verdicts, and the answers that changed, as one string of HTML."""
    (a, file_a), (b, file_b) = baseline, candidate
    return _render(
        "two_reports.html.j2",
        {},
        comparison=rows,
        apart=differences(a.testbed, b.testbed),
        tasks=common_tasks(a, file_a.parent, b, file_b.parent),
        titles=("From right to wrong", "From wrong to right"),
        sides=[
            {"role": "baseline", "report": a, "file": str(file_a)},
            {"role": "candidate", "report": b, "file": str(file_b)},
        ],
    )


def write_history_html(rows: Sequence[HistoryRow], path: Path) -> None:
    """Write the page of `tuneship bench history`."""
    write_atomic(path, render_history(rows))


def render_history(rows: Sequence[HistoryRow]) -> str:
    """Past reports, oldest first, as one string of HTML."""
    digests = list(dict.fromkeys(row.digest for row in rows))
    drawn = {key: charts.over_time([row._asdict() for row in rows], key, title) for key, title in _HISTORY}
    specs = {key: spec for key, spec in drawn.items() if spec}
    colors = [charts.CATEGORIES[index % len(charts.CATEGORIES)] for index in range(len(digests))]
    return _render("history.html.j2", specs, rows=rows, digests=list(zip(digests, colors, strict=True)))


def _render(template: str, specs: dict[str, Spec], **parts: Any) -> str:
    page = _environment().get_template(template)
    return page.render(specs=specs, vega=_vega_bundle() if specs else "", **parts)


def _adapter_columns(report: Report) -> list[str]:
    """Whatever keys there are, in the order in which they first occur."""
    rows = (row for level in report.load for row in level.per_adapter.values())
    return list(dict.fromkeys(key for row in rows for key in row))


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
    environment.filters |= {"ms": format_ms, "figure": format_figure, "label": _label}
    return environment


def _label(key: str) -> str:
    """`ttft_ms_p50` as a column's head: `TTFT p50 ms`."""
    names = {name: name.upper() for name in ("ttft", "tpot", "itl", "e2e")}
    words = [names.get(word, word) for word in key.replace("_per_s", "/s").split("_")]
    return " ".join([word for word in words if word != "ms"] + ["ms"] * ("ms" in words))


def _specs(report: Report) -> dict[str, Spec]:
    drawn: dict[str, Spec | None] = {"loss": charts.loss_curve(report.training) if report.training else None}
    for metric, title in _ECDFS:
        drawn[metric] = charts.latency_ecdf(report.load, metric, title)
    for metric, title in _OVER_TIME:
        drawn[f"{metric}_over_time"] = charts.latency_over_time(report.load, metric, f"{title} over time")
        drawn[f"{metric}_curve"] = charts.throughput_latency(report.load, report.knee, metric, title)
    return {name: spec for name, spec in drawn.items() if spec}
