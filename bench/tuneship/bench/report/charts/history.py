"""Past reports over time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt

from tuneship.bench.report.charts.style import CATEGORIES, Spec, finish


def over_time(rows: Sequence[dict[str, Any]], key: str, title: str) -> Spec | None:
    """`key` of each report at its `created_at`, one colour a testbed `digest`; None where no report has it."""
    known = [row for row in rows if row[key] is not None]
    if not known:
        return None
    digests = list(dict.fromkeys(row["digest"] for row in rows))
    colors = [CATEGORIES[index % len(CATEGORIES)] for index in range(len(digests))]
    chart = (
        alt.Chart(alt.Data(values=known), title=title)
        .mark_line(point=alt.OverlayMarkDef(size=50), strokeWidth=1.5)
        .encode(
            x=alt.X("created_at:T", title=None, axis=alt.Axis(grid=False, tickCount=5, labelOverlap=True)),
            y=alt.Y(
                f"{key}:Q",
                title=None,
                scale=alt.Scale(domain=[0, 1]) if key == "score" else alt.Scale(zero=True),
                axis=alt.Axis(tickCount=5),
            ),
            color=alt.Color("digest:N", sort=None, scale=alt.Scale(domain=digests, range=colors), legend=None),
            tooltip=["name:N", "created_at:T", "digest:N", alt.Tooltip(f"{key}:Q", format=",.4~g")],
        )
        .properties(width=440, height=220)
    )
    return finish(chart)
