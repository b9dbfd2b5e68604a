"""From what happened to each request to the figures of one load level.

Names and definitions are those of SGLang's own benchmark, so that figures can be put side by side:

- TTFT: from send to the first chunk with text.
- ITL: the gaps between chunks with text, all requests pooled.
- TPOT: (E2E - TTFT) / (output tokens - 1), one per request with at least two tokens.
- E2E: from send to the end of the stream.
- output_tokens_per_s: output tokens of completed requests over the time from the first send to the last end.

- goodput: share of the requests *sent* that completed within the objectives.

Latencies are of completed requests. Token counts are the server's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from tuneship.bench.load.drive import Recording
from tuneship.bench.load.stream import RequestRecord
from tuneship.core.report import Arrivals, Block, ClientHealth, LoadResult, Percentiles

_SAMPLES = 512
_BLOCKS, _BLOCK_REQUESTS = 10, 5
# A figure shall be right within 5 %. Lags at sending and at reading add up: the error of a p99 was seen to be three
# times the lag's own p99 (bench/studies/truth.py at 1,000 streams).
_LAG_SHARE = 0.05 / 3
_LAG_LIMITS_MS = (2.0, 20.0)


def summarise(
    recording: Recording,
    *,
    workload: str,
    model: str,
    arrivals: Arrivals,
    rate: float,
    concurrency: int = 0,
    window_s: tuple[float, float] | None = None,
    slo_ms: Mapping[str, float] | None = None,
) -> LoadResult:
    """One level's figures; latencies are None where nothing completed.

    Args:
        recording: the whole level. The client's health is judged over all of it.
        workload: its name in the report.
        model: asked, likewise.
        arrivals: likewise.
        rate: offered.
        concurrency: in flight, in a closed loop.
        window_s: figures are of requests due within it, so that two runs of one schedule count the same requests.
        slo_ms: objectives by `ttft`, `tpot`, `e2e`; those that are 0 are none.

    """
    records = [record for record in recording.records if within(record, window_s)]
    objectives = {name: limit for name, limit in (slo_ms or {}).items() if limit}
    done = [record for record in records if not record.error]
    latencies = {
        "ttft_ms": [ttft_ms(record) for record in done],
        "tpot_ms": [tpot_ms(record) for record in done if record.output_tokens > 1],
        "itl_ms": [gap for record in done for gap in itl_ms(record)],
        "e2e_ms": [e2e_ms(record) for record in done],
    }
    late_ms = [(record.sent_s - record.scheduled_s) * 1e3 for record in done]
    duration_s = measured_duration_s(records)
    output_tokens = sum(record.output_tokens for record in done)
    return LoadResult(
        workload=workload,
        model=model,
        arrivals=arrivals,
        rate=rate,
        concurrency=concurrency,
        requests=len(records),
        completed=len(done),
        window_s=window_s,
        duration_s=duration_s,
        input_tokens=sum(record.input_tokens for record in done),
        output_tokens=output_tokens,
        output_tokens_per_s=_per_second(output_tokens, duration_s),
        requests_per_s=_per_second(len(done), duration_s),
        ttft_from_schedule_ms=percentiles([a + b for a, b in zip(latencies["ttft_ms"], late_ms, strict=True)]),
        e2e_from_schedule_ms=percentiles([a + b for a, b in zip(latencies["e2e_ms"], late_ms, strict=True)]),
        slo_ms=objectives,
        goodput=goodput(records, objectives),
        errors=dict(Counter(record.error for record in records if record.error)),
        client=client_health(recording, latencies["ttft_ms"]),
        per_adapter=_per_adapter(records, duration_s, objectives),
        blocks=blocks(records, window_s) if window_s else [],
        samples={name: thin(values) for name, values in latencies.items() if values},
        timeline=_timeline(done),
        **{name: percentiles(values) for name, values in latencies.items()},
    )


def within(record: RequestRecord, window_s: tuple[float, float] | None) -> bool:
    """Whether the request was due in the window; everything is without one."""
    return window_s is None or window_s[0] <= record.scheduled_s < window_s[1]


def goodput(records: Sequence[RequestRecord], slo_ms: Mapping[str, float]) -> float | None:
    """Share of the requests sent that completed within every objective; None without objectives or requests."""
    if not slo_ms or not records:
        return None
    return sum(_is_good(record, slo_ms) for record in records) / len(records)


def blocks(records: Sequence[RequestRecord], window_s: tuple[float, float]) -> list[Block]:
    """The window in as many equal stretches, at most 10, as leave 5 completed requests to each; none if 1 has fewer."""
    start_s, end_s = window_s
    for count in range(_BLOCKS, 0, -1):
        width_s = (end_s - start_s) / count
        parts: list[list[RequestRecord]] = [[] for _ in range(count)]
        for record in records:
            if not record.error:
                parts[min(count - 1, int((record.scheduled_s - start_s) / width_s))].append(record)
        if min(map(len, parts)) >= _BLOCK_REQUESTS:
            return [_block(start_s + index * width_s, width_s, part) for index, part in enumerate(parts)]
    return []


def ttft_ms(record: RequestRecord) -> float:
    """Time to first token."""
    return (record.chunks_s[0] - record.sent_s) * 1e3


def itl_ms(record: RequestRecord) -> list[float]:
    """Inter-token latencies: the gaps between chunks."""
    return [(later - earlier) * 1e3 for earlier, later in pairwise(record.chunks_s)]


def e2e_ms(record: RequestRecord) -> float:
    """End-to-end latency."""
    return (record.end_s - record.sent_s) * 1e3


def tpot_ms(record: RequestRecord) -> float:
    """Time per output token after the first; needs at least two."""
    return (e2e_ms(record) - ttft_ms(record)) / (record.output_tokens - 1)


def measured_duration_s(records: Sequence[RequestRecord]) -> float:
    """From the first send to the last end."""
    sent = [record for record in records if record.end_s]
    return max((r.end_s for r in sent), default=0.0) - min((r.sent_s for r in sent), default=0.0)


def percentiles(values: Sequence[float]) -> Percentiles | None:
    """With linear interpolation, as numpy and SGLang's benchmark do; None without values."""
    if not values:
        return None
    p50, p90, p95, p99 = (float(value) for value in np.percentile(values, (50, 90, 95, 99)))
    return Percentiles(p50=p50, p90=p90, p95=p95, p99=p99, mean=float(np.mean(values)))


def client_health(recording: Recording, ttfts_ms: Sequence[float]) -> ClientHealth:
    """Whether the client's own lag is small beside what it measured.

    The limit is a sixtieth of the median TTFT, at least 2 ms and at most 20 ms.
    """
    dispatch_ms = [(record.sent_s - record.scheduled_s) * 1e3 for record in recording.records]
    loop_ms = [lag * 1e3 for lag in recording.loop_lag_s]
    lag_ms = max(_p99(dispatch_ms), _p99(loop_ms))
    least, most = _LAG_LIMITS_MS
    limit_ms = min(most, max(least, _LAG_SHARE * float(np.median(ttfts_ms)))) if ttfts_ms else most
    return ClientHealth(
        lag_p99_ms=lag_ms,
        limit_ms=limit_ms,
        processes=recording.processes,
        cpu_s=recording.cpu_s,
        valid=lag_ms <= limit_ms,
    )


def thin(values: Sequence[float]) -> list[float]:
    """At most 512 sorted values with the same distribution: evenly spaced quantiles, both ends kept."""
    ordered = np.sort(np.asarray(values, dtype=float))
    if len(ordered) > _SAMPLES:
        ordered = np.quantile(ordered, np.linspace(0, 1, _SAMPLES))
    return [round(float(value), 3) for value in ordered]


def _per_adapter(
    records: Sequence[RequestRecord], duration_s: float, slo_ms: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    models = sorted({record.model for record in records})
    if len(models) < 2:
        return {}
    return {model: _adapter([r for r in records if r.model == model], duration_s, slo_ms) for model in models}


def _adapter(records: Sequence[RequestRecord], duration_s: float, slo_ms: Mapping[str, float]) -> dict[str, float]:
    done = [record for record in records if not record.error]
    figures = {
        "requests": float(len(records)),
        "completed": float(len(done)),
        "errors": float(len(records) - len(done)),
        "output_tokens_per_s": _per_second(sum(record.output_tokens for record in done), duration_s),
    }
    if (share := goodput(records, slo_ms)) is not None:
        figures["goodput"] = share
    medians = {
        "ttft_ms_p50": [ttft_ms(record) for record in done],
        "tpot_ms_p50": [tpot_ms(record) for record in done if record.output_tokens > 1],
        "e2e_ms_p50": [e2e_ms(record) for record in done],
    }
    return figures | {name: float(np.median(values)) for name, values in medians.items() if values}


def _is_good(record: RequestRecord, slo_ms: Mapping[str, float]) -> bool:
    if record.error:
        return False
    figures = {"ttft": ttft_ms(record), "e2e": e2e_ms(record)}
    if record.output_tokens > 1:
        figures["tpot"] = tpot_ms(record)
    return all(figures.get(name, 0.0) <= limit for name, limit in slo_ms.items())


def _block(start_s: float, width_s: float, done: Sequence[RequestRecord]) -> Block:
    return Block(
        start_s=start_s,
        requests=len(done),
        ttft_ms=_median([ttft_ms(record) for record in done]),
        tpot_ms=_median([tpot_ms(record) for record in done if record.output_tokens > 1]),
        itl_ms=_median([gap for record in done for gap in itl_ms(record)]),
        e2e_ms=_median([e2e_ms(record) for record in done]),
        output_tokens_per_s=_per_second(sum(record.output_tokens for record in done), width_s),
    )


def _median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if values else None


def _timeline(done: Sequence[RequestRecord]) -> list[tuple[float, float, float]]:
    """(sent at, TTFT, E2E) of at most 512 requests, evenly spaced in their order."""
    count = min(len(done), _SAMPLES)
    kept = [done[index * len(done) // count] for index in range(count)]
    return [(round(r.sent_s, 4), round(ttft_ms(r), 3), round(e2e_ms(r), 3)) for r in kept]


def _per_second(tokens: int, duration_s: float) -> float:
    return tokens / duration_s if duration_s > 0 else 0.0


def _p99(values: Sequence[float]) -> float:
    return max(0.0, float(np.percentile(values, 99))) if values else 0.0
