"""The engine's own page, before and after."""

from tuneship.bench.load import engine_metrics, gpu
from tuneship.bench.load.engine_metrics import change, parse
from tuneship.core.hardware import detect

_PAGE = """# TYPE sglang:generation_tokens_total counter
sglang:generation_tokens_total{{model="m"}} {tokens}
# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{{model="m"}} {running}
# TYPE sglang:queue_time_seconds histogram
sglang:queue_time_seconds_bucket{{le="1"}} {count}
sglang:queue_time_seconds_bucket{{le="+Inf"}} {count}
sglang:queue_time_seconds_sum {total}
sglang:queue_time_seconds_count {count}
# TYPE python_gc counter
python_gc_total 9
"""
_TWO_COPIES = """# TYPE sglang:generation_tokens_total counter
sglang:generation_tokens_total{is_streaming="true"} 30
sglang:generation_tokens_total{is_streaming="false"} 4
# TYPE sglang:http_requests_total counter
sglang:http_requests_total{endpoint="/v1/chat/completions"} 6
sglang:http_requests_total{endpoint="/metrics"} 2
# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{dp_rank="0",tp_rank="0",priority=""} 3
sglang:num_running_reqs{dp_rank="0",tp_rank="1",priority=""} 3
sglang:num_running_reqs{dp_rank="0",tp_rank="0",priority="7"} 2
sglang:num_running_reqs{dp_rank="1",tp_rank="0",priority=""} 5
# TYPE sglang:token_usage gauge
sglang:token_usage{dp_rank="0",tp_rank="0"} 0.5
sglang:token_usage{dp_rank="0",tp_rank="1"} 0.5
sglang:token_usage{dp_rank="1",tp_rank="0"} 0.75
# TYPE sglang:fwd_occupancy gauge
sglang:fwd_occupancy{dp_rank="0"} NaN
# TYPE sglang:routing_key_running_req_count gauge
sglang:routing_key_running_req_count{gt="0",le="1"} 1
# TYPE sglang:per_stage_req_latency_seconds histogram
sglang:per_stage_req_latency_seconds_sum{dp_rank="0",stage="decode"} 6
sglang:per_stage_req_latency_seconds_count{dp_rank="0",stage="decode"} 2
sglang:per_stage_req_latency_seconds_sum{dp_rank="1",stage="decode"} 2
sglang:per_stage_req_latency_seconds_count{dp_rank="1",stage="decode"} 2
sglang:per_stage_req_latency_seconds_sum{dp_rank="0",stage="prefill"} 9
sglang:per_stage_req_latency_seconds_count{dp_rank="0",stage="prefill"} 1
"""


def test_counters_are_deltas_gauges_the_last_and_histograms_a_mean() -> None:
    before = parse(_PAGE.format(tokens=100, running=5, total=10, count=10))
    after = parse(_PAGE.format(tokens=160, running=2, total=16, count=13))
    assert change(before, after) == {
        "sglang:generation_tokens_total": 60,
        "sglang:num_running_reqs": 2,
        "sglang:queue_time_seconds": 2,
    }


def test_copies_add_up_ranks_count_once_and_kinds_stay_apart() -> None:
    assert change(engine_metrics.EMPTY, parse(_TWO_COPIES)) == {
        "sglang:generation_tokens_total": 34,
        "sglang:http_requests_total": 6,
        "sglang:num_running_reqs": 8,
        "sglang:token_usage": 0.625,
        "sglang:per_stage_req_latency_seconds{stage=decode}": 2,
        "sglang:per_stage_req_latency_seconds{stage=prefill}": 9,
    }


def test_a_gauge_that_is_no_use_here_is_left_out() -> None:
    idle, busy = (parse(_PAGE.format(tokens=1, running=running, total=1, count=1)) for running in (0, 4))
    assert "sglang:num_running_reqs" not in change(idle, idle)
    assert change(busy, idle)["sglang:num_running_reqs"] == 0
    assert change(idle, busy)["sglang:num_running_reqs"] == 4


def test_an_engine_that_began_again_has_no_negative_counts() -> None:
    before = parse(_PAGE.format(tokens=100, running=5, total=10, count=10))
    after = parse(_PAGE.format(tokens=60, running=2, total=3, count=2))
    assert change(before, after) == {
        "sglang:generation_tokens_total": 60,
        "sglang:num_running_reqs": 2,
        "sglang:queue_time_seconds": 1.5,
    }


def test_a_server_without_the_page_has_no_figures(server) -> None:
    assert engine_metrics.scrape(server.url) == engine_metrics.EMPTY
    assert change(engine_metrics.EMPTY, engine_metrics.EMPTY) == {}


def test_gpus_are_those_that_nvml_has() -> None:
    with gpu.watch() as seen:
        pass
    assert len(seen) == len(detect().gpus)
