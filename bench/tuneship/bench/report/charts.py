"""The report's charts, as Vega-Lite specifications that carry their data."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import altair as alt

from tuneship.core.report import LoadResult, LossPoint

_INK, _MUTED, _RULE, _ACCENT, _PALE = "#1f2328", "#656d76", "#e6e8eb", "#17507d", "#a9c4da"
_FONT = "Inter, 'Helvetica Neue', Helvetica, Arial, 'Liberation Sans', sans-serif"
_POINTS = 160
_MANTISSAS = ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8))
_SMALLEST_MS = 0.1  # a log axis has no zero: chunks that arrived together

Spec = dict[str, Any]


def loss_curve(points: Sequence[LossPoint]) -> Spec:
    """Loss by step: as logged, and its moving average."""
    averages = _moving_average([point.loss for point in points])
    rows = [
        {"step": point.step, "loss": point.loss, "average": average}
        for point, average in zip(points, averages, strict=True)
    ]
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("step:Q", title="optimiser step", axis=alt.Axis(tickMinStep=1, tickCount=10, grid=False)),
        tooltip=[alt.Tooltip("step:Q"), alt.Tooltip("loss:Q", format=".4f")],
    )
    title = "loss, nats per answer token"
    logged = base.mark_line(color=_PALE, strokeWidth=1.2).encode(
        y=alt.Y("loss:Q", title=title, scale=alt.Scale(zero=True))
    )
    trend = base.mark_line(color=_ACCENT, strokeWidth=2.2).encode(y=alt.Y("average:Q", title=title))
    return _finish(alt.layer(logged, trend).properties(width=916, height=260))


def latency_ecdf(levels: Sequence[LoadResult], metric: str, title: str) -> Spec | None:
    """The share of samples of `metric` at or below x, one line a load level; None without samples."""
    rows = [
        {"level": _label(level), "ms": max(_SMALLEST_MS, value), "share": share}
        for level in levels
        for value, share in _steps(level.samples.get(metric, []))
    ]
    if not rows:
        return None
    color = alt.Color(
        "level:N",
        sort=None,
        scale=alt.Scale(domain=[_label(level) for level in levels], range=ramp(len(levels))),
        legend=None,
    )
    chart = (
        alt.Chart(alt.Data(values=rows), title=title)
        .mark_line(interpolate="step-after", strokeWidth=2)
        .encode(
            x=_log_axis(rows, "milliseconds"),
            y=alt.Y("share:Q", title=None, scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format="%", tickCount=5)),
            color=color,
            tooltip=[
                alt.Tooltip("level:N", title="offered"),
                alt.Tooltip("ms:Q", format=".1f"),
                alt.Tooltip("share:Q", format=".0%", title="at or below"),
            ],
        )
        .properties(width=290, height=255)
    )
    return _finish(chart)


def ramp(count: int) -> list[str]:
    """`count` blues from light to dark: more load, more ink."""
    light, dark = (0x8F, 0xBA, 0xDB), (0x0B, 0x36, 0x5C)
    shares = [index / (count - 1) for index in range(count)] if count > 1 else [0.7] * count
    mixed = [[round(a + (b - a) * share) for a, b in zip(light, dark, strict=True)] for share in shares]
    return [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in mixed]


def _moving_average(values: Sequence[float]) -> list[float]:
    """Centred, so that it does not lag behind a falling curve; the window is cut off at both ends."""
    reach = len(values) // 24
    return [statistics.fmean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]


def _label(level: LoadResult) -> str:
    return f"{level.rate:g}/s"


def _steps(ordered: Sequence[float]) -> list[tuple[float, float]]:
    """(value, share at or below it) of sorted samples, at most `_POINTS` of them, the ends kept."""
    if not ordered:
        return []
    count = min(len(ordered), _POINTS)
    chosen = sorted({round(index * (len(ordered) - 1) / max(1, count - 1)) for index in range(count)})
    return [(ordered[index], (index + 1) / len(ordered)) for index in chosen]


def _log_axis(rows: Sequence[dict[str, Any]], title: str) -> alt.X:
    """A logarithmic axis just wide enough, with round ticks: powers of ten if there are three, else finer ones."""
    low = min(row["ms"] for row in rows) / 1.15
    high = max(row["ms"] for row in rows) * 1.15
    choices = ([m * 10.0**e for e in range(-1, 7) for m in mantissas] for mantissas in _MANTISSAS)
    inside = ([tick for tick in ticks if low <= tick <= high] for ticks in choices)
    ticks = next((ticks for ticks in inside if len(ticks) >= 3), None)
    axis = alt.Axis(format=",~g", **({"values": ticks} if ticks else {"tickCount": 3}))
    return alt.X("ms:Q", title=title, scale=alt.Scale(type="log", domain=[low, high], nice=False), axis=axis)


def _finish(chart: alt.Chart | alt.LayerChart) -> Spec:
    styled = (
        chart.configure(
            font=_FONT, background="transparent", autosize=alt.AutoSizeParams(type="fit", contains="padding")
        )
        .configure_view(stroke=None)
        .configure_axis(
            labelColor=_MUTED,
            titleColor=_MUTED,
            titleFontWeight="normal",
            labelFontSize=11,
            titleFontSize=11,
            gridColor=_RULE,
            domainColor=_RULE,
            tickColor=_RULE,
            titlePadding=8,
        )
        .configure_title(anchor="start", color=_INK, fontSize=13, fontWeight=600, offset=10)
    )
    spec: Spec = styled.to_dict()
    return spec
