"""The screen of `tuneship top`: a few answers of `/admin/status`, drawn with rich.

Requests and tokens a second are of the last 10 s; TTFT and errors of all the answers that are given (a minute's). One
answer alone has no past: then all figures are counts since a version is served. `~` stands before tokens that were
counted by the events of streams.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tuneship.serve.status import Counts, SlotStatus, Status, VersionStatus

_RATE_S = 10.0
_ORDER = ("live", "canary", "loaded", "draining", "checked")
_COLOURS = {"ready": "green", "live": "green", "canary": "yellow", "draining": "yellow", "restarting": "red"}
_LEGEND = "slot: where an adapter must lie to answer, copied there when asked   loaded: answers its full name alone"


class Sample(NamedTuple):
    """An answer, and when it came, in seconds of any clock."""

    at: float
    status: Status


def render(samples: Sequence[Sample], problem: str = "") -> RenderableType:
    """The screen after these answers, the latest last; `problem` is why there is no later one."""
    figures = _Figures(samples)
    lines, slots = [_engine_line(figures.now), _traffic_line(figures)], figures.now.slots
    if slots.total:
        lines.append(_slots_line(slots))
    if slots.thrashing:
        remedy = f"restart with --max-loras {slots.wanted - 1}, or pin what is asked for most"
        lines.append(Text(f"adapters wait for slots: {remedy}", style="bold red"))
    if failure := figures.now.engine.last_failure:
        lines.append(Text(f"last failure: {failure}", style="dim"))
    if problem:
        lines.append(Text(problem, style="bold red"))
    times = "req/s and tok/s: last 10 s; TTFT and errors: last minute" if figures.rated else "since each is served"
    legend = [times, _LEGEND] if slots.total else [times]
    return Group(*lines, Text(), _table(figures), *(Text(line, style="dim") for line in legend))


class _Rate(NamedTuple):
    """A second, or in all where there is one answer alone. Streams without `usage` tell `tokens` only `about`."""

    requests: float = 0.0
    tokens: float = 0.0
    about: bool = False

    def __str__(self) -> str:
        """The tokens."""
        return f"{'~' if self.about else ''}{_number(self.tokens)}"


class _Figures:
    """What is shown, from the latest answer and earlier ones; sums where there are none."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        *earlier, latest = samples
        self.now = latest.status
        self.rated = bool(earlier)
        # The last one may be older than that, where the latest took long to come.
        recent = [sample for sample in earlier if latest.at - sample.at <= _RATE_S] or earlier[-1:]
        near = recent[0] if recent else None
        self._seconds = latest.at - near.at if near else 1.0
        self._near = near.status if near else None
        self._first = earlier[0].status if earlier else None

    def window(self, version: str) -> Counts:
        """Of all the time there is."""
        return self._since(version, self._first)

    def rate(self, version: str) -> _Rate:
        """Of one version."""
        counts = self._since(version, self._near)
        tokens = counts.completion_tokens + counts.chunks
        return _Rate(counts.requests / self._seconds, tokens / self._seconds, about=counts.chunks > 0)

    def all(self) -> _Rate:
        """Of all versions."""
        rates = [self.rate(version) for version in self.now.metrics]
        requests, tokens = sum(rate.requests for rate in rates), sum(rate.tokens for rate in rates)
        return _Rate(requests, tokens, about=any(rate.about for rate in rates))

    def _since(self, version: str, earlier: Status | None) -> Counts:
        return self.now.metrics.get(version, Counts()).since(earlier.metrics.get(version) if earlier else None)


def _engine_line(status: Status) -> Text:
    engine = status.engine
    line = Text.assemble("engine ", (engine.state, _COLOURS.get(engine.state, "yellow")))
    if engine.up_s:
        line.append(f"   up {_duration(engine.up_s)}")
    return line.append(f"   restarts {engine.restarts}   pid {engine.pid}")


def _traffic_line(figures: _Figures) -> Text:
    status = figures.now
    rate = figures.all()
    units = ("requests/s", "tokens/s") if figures.rated else ("requests", "tokens")
    return Text(f"in flight {status.in_flight}   {_number(rate.requests)} {units[0]}   {rate} {units[1]}")


def _slots_line(slots: SlotStatus) -> Text:
    """In the numbers of `--max-loras`, which counts adapters; the base has a place beside them."""
    return Text(
        f"slots {slots.total - 1} for adapters, 1 for the base   "
        f"last minute: adapters asked for {slots.wanted - 1}, requests that waited {slots.misses_per_minute:.0f}"
    )


def _table(figures: _Figures) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    # Where the terminal is narrow these two give way, and no figure does.
    table.add_column("version", overflow="ellipsis", min_width=12)
    table.add_column("state", overflow="ellipsis")
    units = ("req/s", "tok/s") if figures.rated else ("requests", "tokens")
    for name in ("weight", "in\nflight", units[0], "TTFT ms\np50 / p99", units[1], "errors"):
        table.add_column(name, justify="right", no_wrap=True)
    for version in _rows(figures.now):
        table.add_row(*_row(version, figures))
    return table


def _rows(status: Status) -> list[VersionStatus]:
    """The base, or the one model, then the versions by alias, what answers first."""
    known = {version.version for version in status.versions}
    own = [
        VersionStatus(alias="", version=name, state="base", in_flight=counts.in_flight)
        for name, counts in status.metrics.items()
        if name not in known
    ]
    served = [version for version in status.versions if version.state in _ORDER]
    return [*own, *sorted(served, key=lambda version: (version.alias, _ORDER.index(version.state), version.version))]


def _row(version: VersionStatus, figures: _Figures) -> list[str | Text]:
    window = figures.window(version.version)
    rate = figures.rate(version.version)
    state = ", ".join(
        [
            version.state,
            *(["pinned"] if version.pinned else []),
            *(["failed"] if version.verified.startswith("failed") else []),
        ]
    )
    errors = " ".join(f"{status}:{count}" for status, count in sorted(window.errors.items()))
    colour = "red" if version.verified.startswith("failed") else _COLOURS.get(version.state, "")
    return [
        version.version,
        Text(state, style=colour),
        f"{version.weight:.0%}" if version.weight else "-",
        str(version.in_flight),
        _number(rate.requests),
        " / ".join(_milliseconds(window.ttft_s.quantile(share)) for share in (0.5, 0.99))
        if window.ttft_s.count
        else "-",
        str(rate),
        Text(errors or "0", style="red" if errors else ""),
    ]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def _milliseconds(seconds: float) -> str:
    return "inf" if math.isinf(seconds) else f"{seconds * 1000:,.{1 if seconds < 0.01 else 0}f}"


def _duration(seconds: float) -> str:
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {seconds % 60:.0f} s" if minutes else f"{seconds:.0f} s"
