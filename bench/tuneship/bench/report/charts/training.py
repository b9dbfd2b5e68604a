"""How training went."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import altair as alt

from tuneship.bench.report.charts.style import ACCENT, PALE, Spec, finish
from tuneship.core.report import LossPoint


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
    logged = base.mark_line(color=PALE, strokeWidth=1.2).encode(
        y=alt.Y("loss:Q", title=title, scale=alt.Scale(zero=True))
    )
    trend = base.mark_line(color=ACCENT, strokeWidth=2.2).encode(y=alt.Y("average:Q", title=title))
    return finish(alt.layer(logged, trend).properties(width=916, height=260))


def _moving_average(values: Sequence[float]) -> list[float]:
    """Centred, so that it does not lag behind a falling curve; the window is cut off at both ends."""
    reach = len(values) // 24
    return [statistics.fmean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]
