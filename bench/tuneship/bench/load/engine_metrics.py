"""The engine's own figures over a level, from its Prometheus page: `<url>/metrics`, where there is one.

Counters are what was added, gauges what they were at the end, histograms the mean of what was observed meanwhile. What
differs in kind keeps its label, `sglang:per_stage_req_latency_seconds{stage=decode}`. The rest becomes one figure:

- Ranks of one copy of the model see the same requests: the largest of them counts once.
- Copies (`dp_rank`) and everything else (models, streaming or not) add up; of shares and settings, the mean.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import httpx
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

_PREFIX = "sglang:"
_TIMEOUT_S = 5
_KINDS = ("stage", "mode", "category", "cache_source", "component", "phase")
_RANKS = {"tp_rank", "pp_rank", "moe_ep_rank"}
# Of two copies, each half full, the sum would be a full one.
_MEAN = re.compile(r"(_usage|_rate|_ratio|_length|_len|_size|utilization|occupancy|_seconds|_steps|is_cuda_graph)$")


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
    counters: dict[str, float] = {}
    gauges: dict[str, float] = {}
    histograms: dict[str, tuple[float, float]] = {}
    for family in text_string_to_metric_families(page):
        if not family.name.startswith(_PREFIX):
            continue
        if family.type == "counter":  # the parser takes the ending off
            samples = [sample for sample in family.samples if sample.name.endswith("_total")]
            counters |= _figures(f"{family.name}_total", samples)
        elif family.type == "gauge":
            gauges |= _figures(family.name, filter(_is_total, family.samples), mean=bool(_MEAN.search(family.name)))
        elif family.type == "histogram":
            sums = _figures(family.name, (sample for sample in family.samples if sample.name.endswith("_sum")))
            counts = _figures(family.name, (sample for sample in family.samples if sample.name.endswith("_count")))
            histograms |= {name: (sums[name], count) for name, count in counts.items() if name in sums}
    return Scrape(counters, gauges, histograms)


def change(before: Scrape, after: Scrape) -> dict[str, float]:
    """What happened between two looks: {metric: figure}. An engine that restarted meanwhile began again at 0.

    A gauge that was 0 both times is left out: SGLang has dozens for what this engine does not do.
    """
    gauges = {name: value for name, value in after.gauges.items() if value or before.gauges.get(name)}
    counted = {name: _since(before.counters.get(name, 0.0), value) for name, value in after.counters.items()}
    means = {}
    for name, (total, count) in after.histograms.items():
        total_before, count_before = before.histograms.get(name, (0.0, 0.0))
        if count < count_before:
            total_before, count_before = 0.0, 0.0
        if count > count_before:
            means[name] = (total - total_before) / (count - count_before)
    return dict(sorted((counted | gauges | means).items()))


def _figures(name: str, samples: Iterable[Sample], *, mean: bool = False) -> dict[str, float]:
    """One figure a kind: over ranks the largest, over what is left the sum or the mean. What is no number is left out.

    The engine's count of requests for this page is left out too: they are ours.
    """
    copies: Mapping[str, dict[frozenset[tuple[str, str]], float]] = defaultdict(dict)
    for sample in samples:
        if math.isfinite(sample.value) and sample.labels.get("endpoint") != "/metrics":
            kinds = ",".join(f"{label}={sample.labels[label]}" for label in _KINDS if sample.labels.get(label))
            copy = frozenset(item for item in sample.labels.items() if item[0] not in _RANKS)
            seen = copies[f"{name}{{{kinds}}}" if kinds else name]
            seen[copy] = max(sample.value, seen.get(copy, sample.value))
    return {kind: sum(seen.values()) / (len(seen) if mean else 1) for kind, seen in copies.items()}


def _is_total(sample: Sample) -> bool:
    """Not a part of a gauge whose whole is there too, nor a bucket that is written as a gauge."""
    return not sample.labels.get("priority") and "le" not in sample.labels


def _since(before: float, after: float) -> float:
    return after - before if after >= before else after
