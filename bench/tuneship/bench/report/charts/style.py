"""What all charts share: colours, fonts, axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt

INK, MUTED, RULE, ACCENT, PALE, BAD = "#1f2328", "#656d76", "#e6e8eb", "#17507d", "#a9c4da", "#b3261e"
CATEGORIES = ("#17507d", "#c2571a", "#3b7d4f", "#7a4a9c", "#8a6d1c", "#656d76")
_FONT = "Inter, 'Helvetica Neue', Helvetica, Arial, 'Liberation Sans', sans-serif"
_MANTISSAS = ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8))
SMALLEST_MS = 0.1  # a log axis has no zero: chunks that arrived together

Spec = dict[str, Any]


def ramp(count: int) -> list[str]:
    """`count` blues from light to dark: more load, more ink."""
    light, dark = (0x8F, 0xBA, 0xDB), (0x0B, 0x36, 0x5C)
    shares = [index / (count - 1) for index in range(count)] if count > 1 else [0.7] * count
    mixed = [[round(a + (b - a) * share) for a, b in zip(light, dark, strict=True)] for share in shares]
    return [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in mixed]


def log_x(rows: Sequence[dict[str, Any]], title: str) -> alt.X:
    """A logarithmic axis for `ms`."""
    scale, axis = _log(rows)
    return alt.X("ms:Q", title=title, scale=scale, axis=axis)


def log_y(rows: Sequence[dict[str, Any]], title: str) -> alt.Y:
    """A logarithmic axis for `ms`."""
    scale, axis = _log(rows)
    return alt.Y("ms:Q", title=title, scale=scale, axis=axis)


def _log(rows: Sequence[dict[str, Any]]) -> tuple[alt.Scale, alt.Axis]:
    """Just wide enough, with round ticks: powers of ten if there are three, else finer ones."""
    low = min(row["ms"] for row in rows) / 1.15
    high = max(row["ms"] for row in rows) * 1.15
    choices = ([m * 10.0**e for e in range(-1, 7) for m in mantissas] for mantissas in _MANTISSAS)
    inside = ([tick for tick in ticks if low <= tick <= high] for ticks in choices)
    ticks = next((ticks for ticks in inside if len(ticks) >= 3), None)
    axis = alt.Axis(format=",~g", **({"values": ticks} if ticks else {"tickCount": 3}))
    return alt.Scale(type="log", domain=[low, high], nice=False), axis


def finish(chart: alt.Chart | alt.LayerChart) -> Spec:
    """The specification of a chart in the house style."""
    styled = (
        chart.configure(
            font=_FONT, background="transparent", autosize=alt.AutoSizeParams(type="fit", contains="padding")
        )
        .configure_view(stroke=None)
        .configure_axis(
            labelColor=MUTED,
            titleColor=MUTED,
            titleFontWeight="normal",
            labelFontSize=11,
            titleFontSize=11,
            gridColor=RULE,
            domainColor=RULE,
            tickColor=RULE,
            titlePadding=8,
        )
        .configure_title(anchor="start", color=INK, fontSize=13, fontWeight=600, offset=10)
    )
    spec: Spec = styled.to_dict()
    return spec
