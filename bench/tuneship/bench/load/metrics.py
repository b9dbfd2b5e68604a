"""From what happened to each request to the figures of one load level.

Names and definitions are those of SGLang's own benchmark, so that figures can be put side by side:

- TTFT: from send to the first chunk with text.
- ITL: the gaps between chunks with text, all requests pooled.
- TPOT: (E2E - TTFT) / (output tokens - 1), one per request with at least two tokens.
- E2E: from send to the end of the stream.
- output_tokens_per_s: output tokens of completed requests over the time from the first send to the last end.

Only completed requests count. Token counts are the server's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from tuneship.bench.load.drive import Recording
from tuneship.bench.load.stream import RequestRecord
from tuneship.bench.load.workload import Arrivals
from tuneship.core.report import ClientHealth, LoadResult, Percentiles

_SAMPLES = 512
_LAG_SHARE = 0.05
_LAG_LIMITS_MS = (2.0, 20.0)


def summarise(recording: Recording, *, workload: str, model: str, arrivals: Arrivals, rate: float) -> LoadResult:
    """One level's figures; latencies are None where nothing completed."""
    records = recording.records
    done = [record for record in records if not record.error]
    latencies = {
        "ttft_ms": [ttft_ms(record) for record in done],
        "tpot_ms": [tpot_ms(record) for record in done if record.output_tokens > 1],
        "itl_ms": [gap for record in done for gap in itl_ms(record)],
        "e2e_ms": [e2e_ms(record) for record in done],
    }
    duration_s = measured_duration_s(records)
    output_tokens = sum(record.output_tokens for record in done)
    return LoadResult(
        workload=workload,
        model=model,
        arrivals=arrivals,
        rate=rate,
        requests=len(records),
        completed=len(done),
        duration_s=duration_s,
        input_tokens=sum(record.input_tokens for record in done),
        output_tokens=output_tokens,
        output_tokens_per_s=_per_second(output_tokens, duration_s),
        errors=dict(Counter(record.error for record in records if record.error)),
        client=client_health(recording, latencies["ttft_ms"]),
        per_adapter=_per_adapter(records, duration_s),
        samples={name: thin(values) for name, values in latencies.items() if values},
        **{name: percentiles(values) for name, values in latencies.items()},
    )


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

    The limit is 5 % of the median TTFT, at least 2 ms and at most 20 ms.
    """
    dispatch_ms = [(record.sent_s - record.scheduled_s) * 1e3 for record in recording.records]
    loop_ms = [lag * 1e3 for lag in recording.loop_lag_s]
    lag_ms = max(_p99(dispatch_ms), _p99(loop_ms))
    least, most = _LAG_LIMITS_MS
    limit_ms = min(most, max(least, _LAG_SHARE * float(np.median(ttfts_ms)))) if ttfts_ms else most
    return ClientHealth(lag_p99_ms=lag_ms, valid=lag_ms <= limit_ms)


def thin(values: Sequence[float]) -> list[float]:
    """At most 512 sorted values with the same distribution: evenly spaced quantiles, both ends kept."""
    ordered = np.sort(np.asarray(values, dtype=float))
    if len(ordered) > _SAMPLES:
        ordered = np.quantile(ordered, np.linspace(0, 1, _SAMPLES))
    return [round(float(value), 3) for value in ordered]


def _per_adapter(records: Sequence[RequestRecord], duration_s: float) -> dict[str, dict[str, float]]:
    models = sorted({record.model for record in records})
    if len(models) < 2:
        return {}
    return {model: _adapter([r for r in records if r.model == model], duration_s) for model in models}


def _adapter(records: Sequence[RequestRecord], duration_s: float) -> dict[str, float]:
    done = [record for record in records if not record.error]
    figures = {
        "requests": float(len(records)),
        "completed": float(len(done)),
        "output_tokens_per_s": _per_second(sum(record.output_tokens for record in done), duration_s),
    }
    medians = {
        "ttft_ms_p50": [ttft_ms(record) for record in done],
        "tpot_ms_p50": [tpot_ms(record) for record in done if record.output_tokens > 1],
        "e2e_ms_p50": [e2e_ms(record) for record in done],
    }
    return figures | {name: float(np.median(values)) for name, values in medians.items() if values}


def _per_second(tokens: int, duration_s: float) -> float:
    return tokens / duration_s if duration_s > 0 else 0.0


def _p99(values: Sequence[float]) -> float:
    return max(0.0, float(np.percentile(values, 99))) if values else 0.0
