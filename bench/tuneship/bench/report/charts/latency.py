"""Latencies by load level: how they were spread, how they ran over time, and what they cost in throughput."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import altair as alt

from tuneship.bench.report.charts.style import BAD, INK, MUTED, PALE, SMALLEST_MS, Spec, finish, log_x, log_y, ramp
from tuneship.core.report import Knee, LoadResult

_POINTS = 160


def latency_ecdf(levels: Sequence[LoadResult], metric: str, title: str) -> Spec | None:
    """The share of samples of `metric` at or below x, one line a load level; None without samples."""
    rows = [
        {"level": level.offered, "ms": max(SMALLEST_MS, value), "share": share}
        for level in levels
        for value, share in _steps(level.samples.get(metric, []))
    ]
    if not rows:
        return None
    chart = (
        alt.Chart(alt.Data(values=rows), title=title)
        .mark_line(interpolate="step-after", strokeWidth=2)
        .encode(
            x=log_x(rows, "milliseconds"),
            y=alt.Y("share:Q", title=None, scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format="%", tickCount=5)),
            color=_color(levels),
            tooltip=[
                alt.Tooltip("level:N", title="offered"),
                alt.Tooltip("ms:Q", format=".1f"),
                alt.Tooltip("share:Q", format=".0%", title="at or below"),
            ],
        )
        .properties(width=290, height=255)
    )
    return finish(chart)


def latency_over_time(levels: Sequence[LoadResult], metric: Literal["ttft_ms", "e2e_ms"], title: str) -> Spec | None:
    """One dot a completed request at the time it was sent, one colour a load level; None without a timeline."""
    column = {"ttft_ms": 1, "e2e_ms": 2}[metric]
    rows = [
        {"level": level.offered, "sent": point[0], "ms": max(SMALLEST_MS, point[column])}
        for level in levels
        for point in level.timeline
    ]
    if not rows:
        return None
    chart = (
        alt.Chart(alt.Data(values=rows), title=title)
        .mark_circle(size=16, opacity=0.6)
        .encode(
            x=alt.X("sent:Q", title="sent at, seconds", axis=alt.Axis(grid=False, tickCount=6)),
            y=log_y(rows, "milliseconds"),
            color=_color(levels),
            tooltip=[
                alt.Tooltip("level:N", title="offered"),
                alt.Tooltip("sent:Q", format=".2f"),
                alt.Tooltip("ms:Q", format=".1f"),
            ],
        )
        .properties(width=440, height=230)
    )
    return finish(chart)


def throughput_latency(
    levels: Sequence[LoadResult], knee: Knee | None, metric: Literal["ttft_ms", "e2e_ms"], title: str
) -> Spec | None:
    """Median latency against output tokens/s, one point a load level; None where there are not two to join.

    The level at the knee's rate is ringed: right of it the server no longer kept up.
    """
    rows = [
        {
            "level": level.offered + (" (knee)" if _is_knee(level, knee) else ""),
            "tokens": level.output_tokens_per_s,
            "ms": max(SMALLEST_MS, latency.p50),
            "knee": _is_knee(level, knee),
            "order": index,
            "loop": "closed" if level.arrivals == "closed" else "open",
        }
        for index, level in enumerate(levels)
        if (latency := level.ttft_ms if metric == "ttft_ms" else level.e2e_ms)
    ]
    if len(rows) < 2:
        return None
    base = alt.Chart(alt.Data(values=rows), title=title).encode(
        x=alt.X(
            "tokens:Q", title="output tokens/s", scale=alt.Scale(zero=True), axis=alt.Axis(grid=False, tickCount=6)
        ),
        y=log_y(rows, "median, milliseconds"),
        tooltip=[
            alt.Tooltip("level:N", title="offered"),
            alt.Tooltip("tokens:Q", format=",.1f"),
            alt.Tooltip("ms:Q", format=".1f"),
        ],
    )
    line = base.mark_line(color=PALE, strokeWidth=2).encode(order="order:Q", detail="loop:N")
    dots = base.mark_circle(size=60, opacity=1).encode(
        color=alt.Color(
            "order:O", scale=alt.Scale(domain=[row["order"] for row in rows], range=ramp(len(rows))), legend=None
        )
    )
    ring = base.transform_filter("datum.knee").mark_point(size=220, color=BAD, strokeWidth=2)
    # Left and above: the line comes from below on the left, and leaves to the right.
    names = base.mark_text(align="right", dx=-9, dy=-8, fontSize=11).encode(
        text="level:N", color=alt.condition("datum.knee", alt.value(INK), alt.value(MUTED))
    )
    return finish(alt.layer(line, ring, dots, names).properties(width=440, height=230))


def _is_knee(level: LoadResult, knee: Knee | None) -> bool:
    return knee is not None and level.arrivals != "closed" and f"{level.rate:.4g}" == f"{knee.rate:.4g}"


def _color(levels: Sequence[LoadResult]) -> alt.Color:
    scale = alt.Scale(domain=[level.offered for level in levels], range=ramp(len(levels)))
    return alt.Color("level:N", sort=None, scale=scale, legend=None)


def _steps(ordered: Sequence[float]) -> list[tuple[float, float]]:
    """(value, share at or below it) of sorted samples, at most `_POINTS` of them, the ends kept."""
    if not ordered:
        return []
    count = min(len(ordered), _POINTS)
    chosen = sorted({round(index * (len(ordered) - 1) / max(1, count - 1)) for index in range(count)})
    return [(ordered[index], (index + 1) / len(ordered)) for index in chosen]
