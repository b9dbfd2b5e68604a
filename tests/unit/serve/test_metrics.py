"""The page that Prometheus reads, by Prometheus' own parser."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from starlette.responses import JSONResponse

from tuneship.serve.metrics import Answer, Live, Metrics

BASE, SQL, OLD = "org/base@1f00", "sql@3fa9", "sql@77aa"


def counting(live: Live | None = None) -> Metrics:
    metrics = Metrics(lambda: live or Live())
    metrics.serving([BASE, SQL, OLD])
    return metrics


def samples(page: bytes) -> dict[tuple[str, ...], float]:
    """{(sample's name, *label values in the order of label names): value}."""
    families = text_string_to_metric_families(page.decode())
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_requests_tokens_and_latencies_of_a_version():
    metrics = counting()
    metrics.answered(Answer(SQL, 200, e2e_s=0.8, ttft_s=0.04, prompt_tokens=7, completion_tokens=5))
    metrics.answered(Answer(SQL, 200, e2e_s=0.4, completion_tokens=3))
    metrics.answered(Answer(SQL, 503))
    page = samples(metrics.text())
    assert page["tuneship_requests_total", "sql", "200", SQL] == 2
    assert page["tuneship_requests_total", "sql", "503", SQL] == 1
    assert page["tuneship_prompt_tokens_total", "sql", SQL] == 7
    assert page["tuneship_completion_tokens_total", "sql", SQL] == 8
    ttft = "tuneship_time_to_first_token_seconds"
    assert page[f"{ttft}_bucket", "sql", "0.03", SQL] == 0
    assert page[f"{ttft}_bucket", "sql", "0.05", SQL] == page[f"{ttft}_bucket", "sql", "+Inf", SQL] == 1
    assert page[f"{ttft}_sum", "sql", SQL] == 0.04
    assert page["tuneship_e2e_request_latency_seconds_count", "sql", SQL] == 2
    # What nobody asked for yet is there, with nothing in it.
    assert page["tuneship_requests_total", "org/base", "200", BASE] == 0


def test_a_value_on_a_bound_is_in_its_bucket():
    metrics = counting()
    for value in (0.005, 0.0051, 1000.0):
        metrics.answered(Answer(SQL, 200, ttft_s=value))
    page = samples(metrics.text())
    counts = [
        page["tuneship_time_to_first_token_seconds_bucket", "sql", le, SQL]
        for le in ("0.005", "0.0075", "60.0", "+Inf")
    ]
    assert counts == [1, 2, 2, 3]


def test_a_version_that_is_gone_takes_its_series_along_and_stays_away():
    metrics = counting()
    metrics.answered(Answer(OLD, 200))
    metrics.answered(Answer(SQL, 200))
    metrics.refused("unsupported_parameter", SQL)
    metrics.serving([BASE, SQL])
    metrics.answered(Answer(OLD, 200))  # its last request, which nobody waited for
    assert OLD.encode() not in metrics.text()
    assert samples(metrics.text())["tuneship_requests_total", "sql", "200", SQL] == 1
    metrics.serving([BASE])
    assert b"sql" not in metrics.text()
    assert SQL not in metrics.snapshot()


def test_an_unknown_name_is_no_label():
    metrics = counting()
    metrics.refused("model_not_found")
    metrics.refused("model_not_found", "evil@1")
    metrics.refused("unsupported_parameter", SQL)
    page = samples(metrics.text())
    assert page["tuneship_refusals_total", "model_not_found", ""] == 2
    assert page["tuneship_refusals_total", "unsupported_parameter", "sql"] == 1
    assert b"evil" not in metrics.text()


def test_adapters_and_what_others_know():
    metrics = counting(Live(True, 2, {SQL: 3, "gone@0": 1}, 9, 4, 1.5, True))
    metrics.adapter_loaded(0.06)
    metrics.adapter_load_failed()
    metrics.adapter_unloaded()
    metrics.adapter_unloaded(failed=True)
    page = samples(metrics.text())
    assert page["tuneship_adapter_loads_total", "loaded"] == page["tuneship_adapter_loads_total", "failed"] == 1
    assert page["tuneship_adapter_unloads_total", "unloaded"] == page["tuneship_adapter_unloads_total", "failed"] == 1
    assert page["tuneship_adapter_load_seconds_sum",] == 0.06
    assert page["tuneship_requests_in_flight", "sql", SQL] == 3
    assert page["tuneship_requests_in_flight", "org/base", BASE] == 0
    assert not any("gone@0" in key for key in page)
    expected = {
        "engine_up": 1,
        "engine_restarts_total": 2,
        "adapter_slots": 9,
        "adapter_slots_wanted": 4,
        "adapter_slot_misses_per_minute": 1.5,
        "adapter_slots_thrashing": 1,
    }
    assert {name: page[f"tuneship_{name}",] for name in expected} == expected


def test_every_family_is_ours_once_and_another_page_may_follow():
    page = counting().text().decode()
    names = [line.split()[2] for line in page.splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names))
    assert all(name.startswith("tuneship_") for name in names)
    assert page.endswith("\n")


def test_the_snapshot_is_strict_json():
    metrics = counting()
    metrics.answered(Answer(SQL, 200, ttft_s=0.04, completion_tokens=5))
    metrics.answered(Answer(SQL, 499, ttft_s=400.0))
    snapshot = metrics.snapshot()
    JSONResponse(snapshot)  # refuses infinities
    version = snapshot[SQL]
    assert {key: version[key] for key in ("requests", "errors", "completion_tokens")} == {
        "requests": 2,
        "errors": {"499": 1},
        "completion_tokens": 5,
    }
    buckets = dict(version["ttft_s"]["buckets"])
    assert (buckets[0.03], buckets[0.05], buckets[60.0], version["ttft_s"]["count"]) == (0, 1, 1, 2)


def test_an_engines_shared_folder_gets_no_file(tmp_path: Path):
    """`prometheus_client` decides when it is imported, by a variable that may be inherited: hence a process."""
    program = """
from tuneship.serve.metrics import Answer, Live, Metrics
metrics = Metrics(Live)
metrics.serving(["sql@3fa9"])
metrics.answered(Answer("sql@3fa9", 200, ttft_s=0.1))
metrics.serving([])
assert b"sql" not in metrics.text()
"""
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-W", "error", "-c", program], env=environment, check=True)
    assert list(tmp_path.iterdir()) == []
