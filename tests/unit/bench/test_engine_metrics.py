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


def test_counters_are_deltas_gauges_the_last_and_histograms_a_mean() -> None:
    before = parse(_PAGE.format(tokens=100, running=5, total=10, count=10))
    after = parse(_PAGE.format(tokens=160, running=2, total=16, count=13))
    assert change(before, after) == {
        "sglang:generation_tokens_total": 60,
        "sglang:num_running_reqs": 2,
        "sglang:queue_time_seconds": 2,
    }


def test_a_server_without_the_page_has_no_figures(server) -> None:
    assert engine_metrics.scrape(server.url) == engine_metrics.EMPTY
    assert change(engine_metrics.EMPTY, engine_metrics.EMPTY) == {}


def test_gpus_are_those_that_nvml_has() -> None:
    with gpu.watch() as seen:
        pass
    assert len(seen) == len(detect().gpus)
