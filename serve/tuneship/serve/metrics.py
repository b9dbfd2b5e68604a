"""What the door counts, as a Prometheus page and as the `metrics` part of `/admin/status`.

    metrics = Metrics(live)                              # `live()`: what others know at this moment
    metrics.serving(["base@1f00", "sql@3fa9c1d20b77"])   # with every change of what is served
    metrics.answered(Answer("sql@3fa9c1d20b77", 200, e2e_s=0.8, ttft_s=0.05))
    metrics.text()

The numbers are plain ones, turned into families when somebody asks: `prometheus_client`'s own counters would be files
shared between processes wherever an engine's PROMETHEUS_MULTIPROC_DIR was inherited, and cannot be removed there.
Labels are versions that are served, status codes and our own words, never a client's: a version that is gone takes its
series with it. Everything happens on the door's event loop.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Of `text`, and still true with the engine's page behind it."""

# Some 1.5 times apart where it matters: a quantile read from them is off by a fifth of itself at most. Each bound is a
# line for each version, and all of them are written between two chunks of somebody's stream.
_TTFT_S = (
    *(0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0),
    *(10.0, 20.0, 60.0),
)
_LONG_S = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Of whole answers and of loads."""
_VERSION = ("alias", "version")


class Live(NamedTuple):
    """What changes without us: read when the page is asked for. `in_flight` is {version: requests}."""

    engine_up: bool = False
    engine_restarts: int = 0
    in_flight: Mapping[str, int] = {}
    slots_total: int = 0
    """The base's included; 0 where no adapters are served."""
    slots_wanted: int = 0
    slot_misses_per_minute: float = 0.0
    thrashing: bool = False


class Answer(NamedTuple):
    """One request to a version, over. Latencies are None where they would mean something else (see `observe.py`)."""

    version: str
    status: int
    e2e_s: float | None = None
    ttft_s: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    chunks: int = 0
    """Of a stream that says no `completion_tokens`: the events with text, about one a token."""


class Metrics:
    """All that the door counts."""

    def __init__(self, live: Callable[[], Live]) -> None:
        self._live = live
        self._versions: dict[str, _Version] = {}
        self._refusals: Counter[tuple[str, str]] = Counter()
        self._loads: Counter[str] = Counter(loaded=0, failed=0)
        self._unloads: Counter[str] = Counter(unloaded=0, failed=0)
        self._load_s = _Histogram(_LONG_S)
        self._registry = CollectorRegistry()
        self._registry.register(_Families(self._families))

    def serving(self, versions: Iterable[str]) -> None:
        """From now on these are served, the base among them; series of others are gone."""
        self._versions = {version: self._versions.get(version) or _Version() for version in versions}
        aliases = {"", *map(alias_of, self._versions)}
        for model, code in list(self._refusals):
            if model not in aliases:
                del self._refusals[model, code]

    def answered(self, answer: Answer) -> None:
        """Count it; not if its version is gone by now."""
        if version := self._versions.get(answer.version):
            version.count(answer)

    def refused(self, code: str, version: str = "") -> None:
        """Count a refusal. `code` is one of our own; `version` is empty where the request named nothing of ours."""
        self._refusals[alias_of(version) if version in self._versions else "", code] += 1

    def adapter_loaded(self, duration_s: float) -> None:
        """An adapter is in the engine, `duration_s` after it was sent there."""
        self._loads["loaded"] += 1
        self._load_s.add(duration_s)

    def adapter_load_failed(self) -> None:
        """The engine did not take one."""
        self._loads["failed"] += 1

    def adapter_unloaded(self, *, failed: bool = False) -> None:
        """One is out of the engine, or it `failed` to let it go."""
        self._unloads["failed" if failed else "unloaded"] += 1

    def text(self) -> bytes:
        """The page, in Prometheus' text format. It ends with a newline: another page may follow."""
        return generate_latest(self._registry)

    def snapshot(self) -> dict[str, dict[str, Any]]:
        """The same for `tuneship top`: {version: in flight now, and counts since it is served}, valid JSON.

        `ttft_s["buckets"]` are (upper bound in seconds, values up to it); `count` is the bucket without a bound.
        """
        in_flight = self._live().in_flight
        return {
            name: {"in_flight": in_flight.get(name, 0), **version.snapshot()}
            for name, version in self._versions.items()
        }

    def _families(self) -> Iterator[Metric]:
        yield from self._of_versions()
        yield from self._of_the_door()
        yield from self._of_others(self._live())

    def _of_versions(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "tuneship_requests",
            "Requests that are over, by status: 499 the client left; a stream that broke off has its error's status.",
            labels=(*_VERSION, "code"),
        )
        prompt = CounterMetricFamily(
            "tuneship_prompt_tokens", "Prompt tokens, of answers that carry `usage`.", labels=_VERSION
        )
        completion = CounterMetricFamily(
            "tuneship_completion_tokens", "Generated tokens, of answers that carry `usage`.", labels=_VERSION
        )
        chunks = CounterMetricFamily(
            "tuneship_chunks", "Events with text, of streams without `usage`: about one a token.", labels=_VERSION
        )
        ttft = HistogramMetricFamily(
            "tuneship_time_to_first_token_seconds",
            "From the request's arrival to a stream's first event.",
            labels=_VERSION,
        )
        e2e = HistogramMetricFamily(
            "tuneship_e2e_request_latency_seconds",
            "From a completion's arrival to its end; good ones.",
            labels=_VERSION,
        )
        for name, version in self._versions.items():
            labels = (alias_of(name), name)
            for status, count in version.by_status.items():
                requests.add_metric((*labels, str(status)), count)
            prompt.add_metric(labels, version.prompt_tokens)
            completion.add_metric(labels, version.completion_tokens)
            chunks.add_metric(labels, version.chunks)
            version.ttft.add_to(ttft, labels)
            version.e2e.add_to(e2e, labels)
        yield from (requests, prompt, completion, chunks, ttft, e2e)

    def _of_the_door(self) -> Iterator[Metric]:
        refusals = CounterMetricFamily(
            "tuneship_refusals",
            "Requests that got an error instead of an answer, by our code; model is empty for names that are not ours.",
            labels=("model", "code"),
        )
        for labels, count in self._refusals.items():
            refusals.add_metric(labels, count)
        loads = CounterMetricFamily("tuneship_adapter_loads", "Adapters sent to the engine.", labels=("outcome",))
        for outcome, count in self._loads.items():
            loads.add_metric((outcome,), count)
        unloads = CounterMetricFamily("tuneship_adapter_unloads", "Adapters taken from it.", labels=("outcome",))
        for outcome, count in self._unloads.items():
            unloads.add_metric((outcome,), count)
        load_s = HistogramMetricFamily("tuneship_adapter_load_seconds", "How long the engine took to load an adapter.")
        self._load_s.add_to(load_s, ())
        yield from (refusals, loads, unloads, load_s)

    def _of_others(self, live: Live) -> Iterator[Metric]:
        in_flight = GaugeMetricFamily("tuneship_requests_in_flight", "Requests that are not over.", labels=_VERSION)
        for version in self._versions:
            in_flight.add_metric((alias_of(version), version), live.in_flight.get(version, 0))
        yield in_flight
        yield GaugeMetricFamily("tuneship_engine_up", "1 while the engine answers.", live.engine_up)
        yield CounterMetricFamily("tuneship_engine_restarts", "Starts after the first.", live.engine_restarts)
        for name, help_, value in (
            ("slots", "Places in a batch, the base's included.", live.slots_total),
            ("slots_wanted", "Models asked for in the last minute or pinned, and the base.", live.slots_wanted),
            ("slot_misses_per_minute", "Estimated requests that wait for weights.", live.slot_misses_per_minute),
            ("slots_thrashing", "1 while many requests wait for weights that more slots would keep.", live.thrashing),
        ):
            yield GaugeMetricFamily(f"tuneship_adapter_{name}", help_, value)


def alias_of(version: str) -> str:
    """What clients call it: `sql` of `sql@3fa9c1d20b77`."""
    return version.rpartition("@")[0]


class _Families(Collector):
    """What a registry asks."""

    def __init__(self, families: Callable[[], Iterator[Metric]]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        """All families, made now."""
        return self._families()


class _Histogram:
    """How many values up to each of `bounds`, and their sum, in seconds."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Count one."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add_to(self, family: HistogramMetricFamily, labels: tuple[str, ...]) -> None:
        """Write it as one series."""
        bounds = (*map(str, self._bounds), "+Inf")
        buckets = [*zip(bounds, accumulate(self._counts), strict=True)]
        family.add_metric(labels, buckets, self._sum)

    def snapshot(self) -> dict[str, Any]:
        """As JSON, which knows no infinity."""
        *counts, total = accumulate(self._counts)
        return {"buckets": [*map(list, zip(self._bounds, counts, strict=True))], "sum": self._sum, "count": total}


class _Version:
    """The counts of one version."""

    def __init__(self) -> None:
        self.by_status: Counter[int] = Counter({200: 0})
        self.ttft, self.e2e = _Histogram(_TTFT_S), _Histogram(_LONG_S)
        self.prompt_tokens = self.completion_tokens = self.chunks = 0

    def count(self, answer: Answer) -> None:
        self.by_status[answer.status] += 1
        if answer.ttft_s is not None:
            self.ttft.add(answer.ttft_s)
        if answer.e2e_s is not None:
            self.e2e.add(answer.e2e_s)
        self.prompt_tokens += answer.prompt_tokens
        self.completion_tokens += answer.completion_tokens
        self.chunks += answer.chunks

    def snapshot(self) -> dict[str, Any]:
        return {
            "requests": self.by_status.total(),
            "errors": {str(status): count for status, count in self.by_status.items() if status >= 400},
            "ttft_s": self.ttft.snapshot(),
            "completion_tokens": self.completion_tokens,
            "chunks": self.chunks,
        }
