"""The definitions, on records whose figures can be worked out by hand, and against SGLang's where it has them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneship.bench.load import metrics
from tuneship.bench.load.drive import Recording
from tuneship.bench.load.stream import RequestRecord


def _record(sent_s: float, chunks_s: list[float], end_s: float, tokens: int, **more) -> RequestRecord:
    ended = {"error": "", "output_tokens": tokens, "input_tokens": 10, "model": "m", "scheduled_s": sent_s} | more
    return RequestRecord(sent_s=sent_s, chunks_s=chunks_s, end_s=end_s, **ended)


def _summary(*records: RequestRecord, lag_s: tuple[float, ...] = ()):
    recording = Recording(list(records), list(lag_s))
    return metrics.summarise(recording, workload="w", model="m", arrivals="poisson", rate=2)


def test_by_hand() -> None:
    result = _summary(
        _record(1.0, [1.1, 1.2, 1.5], 1.6, tokens=6),
        _record(2.0, [2.3], 2.4, tokens=1),  # one token: no TPOT
        _record(0.5, [0.6], 9.0, tokens=0, error="timeout"),
    )
    assert result.ttft_ms.mean == pytest.approx((100 + 300) / 2)
    assert result.ttft_ms.p50 == pytest.approx(200)
    assert result.ttft_ms.p90 == pytest.approx(280)
    assert result.tpot_ms.mean == pytest.approx(500 / 5)
    assert result.itl_ms.mean == pytest.approx((100 + 300) / 2)
    assert result.e2e_ms.mean == pytest.approx((600 + 400) / 2)
    assert result.duration_s == pytest.approx(8.5)  # errors took their time too
    assert result.output_tokens_per_s == pytest.approx(7 / 8.5)
    assert (result.requests, result.completed, result.errors) == (3, 2, {"timeout": 1})
    assert result.samples["e2e_ms"] == pytest.approx([400, 600])


def test_definitions_are_those_of_sglangs_benchmark() -> None:
    """Their formulas, from sglang/benchmark/serving.py, on the same records."""
    records = [_record(i, [i + 0.1 + 0.01 * j * (1 + i % 3) for j in range(8)], i + 0.5, tokens=9) for i in range(40)]
    result = _summary(*records)
    itls, tpots = [], []
    for r in records:
        latency, ttft = r.end_s - r.sent_s, r.chunks_s[0] - r.sent_s
        tpots.append((latency - ttft) / (r.output_tokens - 1))
        itls += [b - a for a, b in zip(r.chunks_s, r.chunks_s[1:], strict=False)]
    assert result.itl_ms.p99 == pytest.approx(np.percentile(itls, 99) * 1000)
    assert result.tpot_ms.p50 == pytest.approx(np.median(tpots) * 1000)


@pytest.mark.parametrize(
    ("lag_ms", "ttft_ms", "valid"),
    [(1.5, 10, True), (3, 10, False), (3, 300, True), (6, 300, False), (19, 5000, True), (25, 5000, False)],
)
def test_the_lag_that_a_client_may_have(lag_ms: float, ttft_ms: float, valid: bool) -> None:
    """A sixtieth of the median TTFT, at least 2 ms and at most 20 ms; from dispatch or from the event loop."""
    late_wakes = _summary(_record(0, [ttft_ms / 1e3], 9, 2), lag_s=(lag_ms / 1e3,) * 100)
    late_sends = _summary(_record(lag_ms / 1e3, [(ttft_ms + lag_ms) / 1e3], 9, 2, scheduled_s=0.0))
    for result in (late_wakes, late_sends):
        assert result.client.lag_p99_ms == pytest.approx(lag_ms)
        assert result.client.valid is valid


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=2000))
def test_thinned_samples_keep_ends_and_order(values: list[float]) -> None:
    kept = metrics.thin(values)
    assert len(kept) == min(len(values), 512)
    assert kept == sorted(kept)
    assert (kept[0], kept[-1]) == pytest.approx((min(values), max(values)), abs=1e-3)


def _even(count: int, spacing_s: float = 1.0, **more) -> list[RequestRecord]:
    return [_record(i * spacing_s, [i * spacing_s + 0.1], i * spacing_s + 0.2, 1, **more) for i in range(count)]


def _windowed(records: list[RequestRecord], window_s: tuple[float, float], **slo_ms: float):
    recording = Recording(records, [], cpu_s=1.5, processes=2)
    return metrics.summarise(
        recording, workload="w", model="m", arrivals="poisson", rate=1, window_s=window_s, slo_ms=slo_ms
    )


def test_what_is_outside_the_window_counts_in_no_figure() -> None:
    records = _even(60)
    records[0] = _record(0, [50], 51, 1)  # a cold start
    result = _windowed(records, (10, 40))
    assert (result.requests, result.completed, result.input_tokens) == (30, 30, 300)
    assert result.ttft_ms.p99 == pytest.approx(100)
    assert result.duration_s == pytest.approx(29.2)
    assert result.requests_per_s == pytest.approx(30 / 29.2)
    assert [sent_s for sent_s, _, _ in result.timeline] == list(range(10, 40))
    assert (result.client.processes, result.client.cpu_s, result.client.limit_ms) == (2, 1.5, 2)


def test_goodput_is_a_share_of_what_was_sent() -> None:
    slow, failed = _record(1, [1.4], 1.5, 1), _record(2, [2.1], 2.2, 0, error="timeout")
    records = [_record(0, [0.1], 0.2, 1), slow, failed, _record(3, [3.1], 3.9, 9)]
    assert _windowed(records, (0, 9), ttft=200, tpot=0).goodput == 0.5
    assert _windowed(records, (0, 9), ttft=200, tpot=50).goodput == 0.25
    assert _windowed(records, (0, 9)).goodput is None


def test_per_adapter_figures_name_errors_and_goodput() -> None:
    records = [*_even(3), _record(1, [], 2, 0, error="timeout", model="n"), _record(1, [1.1], 1.2, 1, model="n")]
    rows = _windowed(records, (0, 9), e2e=500).per_adapter
    assert (rows["m"]["goodput"], rows["m"]["errors"]) == (1, 0)
    assert (rows["n"]["goodput"], rows["n"]["errors"], rows["n"]["requests"]) == (0.5, 1, 2)


@pytest.mark.parametrize(("count", "blocks"), [(4, 0), (5, 1), (14, 2), (50, 10), (500, 10)])
def test_blocks_are_equal_stretches_of_enough_requests(count: int, blocks: int) -> None:
    found = _windowed(_even(count), (0, count)).blocks
    assert len(found) == blocks
    assert sum(block.requests for block in found) == (count if blocks else 0)
    assert [block.start_s for block in found] == pytest.approx([count / blocks * i for i in range(blocks)])
    assert all(block.ttft_ms == pytest.approx(100) and block.tpot_ms is None for block in found)


def test_latency_from_schedule_has_what_the_client_was_late() -> None:
    result = _summary(_record(1.0, [1.1], 1.2, 1, scheduled_s=0.7))
    assert result.ttft_from_schedule_ms.p50 == pytest.approx(400)
    assert result.e2e_from_schedule_ms.p50 == pytest.approx(500)
