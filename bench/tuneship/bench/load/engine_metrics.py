"""The engine's own figures over a level, from its Prometheus page: `<url>/metrics`, where there is one.

Counters are what was added, gauges what they were at the end, histograms the mean of what was observed meanwhile.
Series of one name with different labels (ranks, models) are added up.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import httpx
from prometheus_client.parser import text_string_to_metric_families

_PREFIX = "sglang:"
_TIMEOUT_S = 5


class Scrape(NamedTuple):
    """One look at the page: {metric: value}; histograms as (sum, count)."""

    counters: dict[str, float]
    gauges: dict[str, float]
    histograms: dict[str, tuple[float, float]]


EMPTY = Scrape({}, {}, {})


def scrape(url: str, key: str = "") -> Scrape:
    """What the engine counts now; empty where there is no such page."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx.Client(trust_env=False, timeout=_TIMEOUT_S, headers=headers) as http:
            response = http.get(f"{url}/metrics")
        return parse(response.text) if response.status_code == httpx.codes.OK else EMPTY
    except (httpx.HTTPError, ValueError):  # the figures are an extra: a level is not lost for them
        return EMPTY


def parse(page: str) -> Scrape:
    """Read a page.

    Raises:
        ValueError: it is no Prometheus text.

    """
    sums: Mapping[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for family in text_string_to_metric_families(page):
        if family.name.startswith(_PREFIX):
            for sample in family.samples:
                sums[f"{family.type} {sample.name.removeprefix(family.name)}"][family.name] += sample.value
    totals, counts = sums["histogram _sum"], sums["histogram _count"]
    return Scrape(
        {f"{name}_total": value for name, value in sums["counter _total"].items()},  # the parser takes it off
        dict(sums["gauge "]),
        {name: (totals[name], count) for name, count in counts.items()},
    )


def change(before: Scrape, after: Scrape) -> dict[str, float]:
    """What happened between two looks: {metric: figure}."""
    counted = {name: value - before.counters.get(name, 0.0) for name, value in after.counters.items()}
    means = {}
    for name, (total, count) in after.histograms.items():
        total_before, count_before = before.histograms.get(name, (0.0, 0.0))
        if count > count_before:
            means[name] = (total - total_before) / (count - count_before)
    return dict(sorted((counted | after.gauges | means).items()))
