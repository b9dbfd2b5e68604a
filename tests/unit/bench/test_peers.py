"""The comparison with other load clients: what their output says, what is right; a run of it ends in figures."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

STUDIES = Path(__file__).parents[3] / "bench" / "studies"

# Recorded with the pinned versions against the schedule server (one chunk each 50 ms), cut to what is read.
OURS = {
    "load": [
        {
            "completed": 19,
            "output_tokens": 380,
            "input_tokens": 133,
            "output_tokens_per_s": 92.1791,
            "ttft_ms": {"p50": 326.101, "p99": 351.9502},
            "itl_ms": {"p50": 49.9985, "p99": 52.9051},
            "e2e_ms": {"p50": 1276.6502, "p99": 1300.4065},
            "client": {"lag_p99_ms": 3.4535},
        }
    ]
}
SGLANG = {
    "completed": 30,
    "total_input_tokens": 480,
    "total_output_tokens": 600,
    "output_throughput": 166.3776,
    "median_e2e_latency_ms": 1275.9655,
    "p99_e2e_latency_ms": 1300.0483,
    "median_ttft_ms": 326.3671,
    "p99_ttft_ms": 350.0327,
    "median_itl_ms": 49.9805,
    "p99_itl_ms": 53.0061,
}
GUIDELLM = {
    "request_totals": {"successful": 30, "errored": 0, "incomplete": 0, "total": 30},
    "time_to_first_token_ms": {"successful": {"percentiles": {"p50": 328.0025, "p99": 350.0149}}},
    "inter_token_latency_ms": {"successful": {"percentiles": {"p50": 49.9998, "p99": 50.0891}}},
    "request_latency": {"successful": {"percentiles": {"p50": 1.2783, "p99": 1.2999}}},
    "output_token_count": {"successful": {"total_sum": 600.0}},
    "prompt_token_count": {"successful": {"mean": 7.0}},
    "output_tokens_per_second": {"successful": {"mean": 172.6458}},
}
AIPERF = {
    "request_count": {"unit": "requests", "avg": 6.0},
    "total_output_tokens": {"unit": "tokens", "avg": 120.0},
    "usage_prompt_tokens": {"unit": "tokens", "avg": 7.0, "p50": 7.0, "p99": 7.0},
    "output_token_throughput": {"unit": "tokens/sec", "avg": 42.6933},
    "time_to_first_token": {"unit": "ms", "avg": 329.1313, "p50": 327.3257, "p99": 355.1702},
    "inter_chunk_latency": {"unit": "ms", "avg": 55.05, "p50": 49.6763, "p99": 608.383},
    "inter_token_latency": {"unit": "ms", "avg": 55.05, "p50": 54.5255, "p99": 60.9011},
    "request_latency": {"unit": "ms", "avg": 1375.081, "p50": 1381.6057, "p99": 1479.6186},
}
RECORDED = {
    "ours": ("ours/report.json", OURS),
    "sglang": ("sglang.jsonl", SGLANG),
    "guidellm": ("guidellm.json", {"benchmarks": [{"metrics": GUIDELLM}]}),
    "aiperf": ("aiperf/profile_export_aiperf.json", AIPERF),
}
SAID = {
    "ours": (19, 380, 7.0, {"ttft": (326.101, 351.9502), "itl": (49.9985, 52.9051), "e2e": (1276.6502, 1300.4065)}),
    "sglang": (30, 600, 16.0, {"ttft": (326.3671, 350.0327), "itl": (49.9805, 53.0061), "e2e": (1275.9655, 1300.0483)}),
    "guidellm": (
        *(30, 600, 7.0),
        {"ttft": (328.0025, 350.0149), "itl_mean": (49.9998, 50.0891), "e2e": (1278.3, 1299.9)},
    ),
    "aiperf": (
        *(6, 120, 7.0),
        {
            "ttft": (327.3257, 355.1702),
            "itl": (49.6763, 608.383),
            "itl_mean": (54.5255, 60.9011),
            "e2e_text": (1381.6057, 1479.6186),
        },
    ),
}


@pytest.fixture(scope="module")
def peers():
    sys.path.append(str(STUDIES))  # as when it is run: studies import their neighbours
    return importlib.import_module("peers")


@pytest.mark.parametrize("name", RECORDED)
def test_what_a_tool_says_is_read_by_its_definition(peers, tmp_path: Path, name: str) -> None:
    file, content = RECORDED[name]
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(json.dumps(content))
    said = peers.TOOLS[name].parse(tmp_path)
    completed, output_tokens, input_tokens, figures = SAID[name]
    assert (said.completed, said.output_tokens, said.input_tokens_per_request) == (
        completed,
        output_tokens,
        input_tokens,
    )
    assert said.figures == {key: pytest.approx(pair) for key, pair in figures.items()}


def _run(peers, ttft_p99: float, itl: dict[str, tuple[float, float]], completed: int = 2):
    """Two answers after a warm-up: first chunk after 300 ms, then 40 and 60 ms, end 10 ms later."""
    note = [0.0, 0.3, 0.34, 0.4, 0.41]
    notes = {"warm-up": [-9.0, -1.0, 0.0, 0.0], **{f"m#{n}": [n + at_s for at_s in note] for n in range(2)}}
    said = peers.Said(completed, 6, 7.0, 1.0, {"ttft": (300.0, ttft_p99), **itl})
    return peers.Run(said, 1.0, 2.0, notes)


def test_each_definition_is_made_of_the_same_notes(peers) -> None:
    run = _run(peers, 300, {})
    assert {name: sorted(map(round, values)) for name, values in peers.truths(run.notes, run.said).items()} == {
        "ttft": [300, 300],
        "itl": [40, 40, 60, 60],
        "itl_mean": [50, 50],
        "e2e": [410, 410],
        "e2e_text": [400, 400],
    }


def test_a_number_of_streams_holds_within_two_milliseconds_of_the_notes(peers) -> None:
    assert peers._held(_run(peers, 301.9, {"itl": (50.0, 61.9)}))["held"]
    assert not peers._held(_run(peers, 302.1, {"itl": (50.0, 60.0)}))["held"]
    assert not peers._held(_run(peers, 300.0, {"itl": (50.0, 57.9)}))["held"]
    assert peers._held(_run(peers, 300.0, {"itl_mean": (50.0, 51.9)}))["held"]
    assert not peers._held(_run(peers, 300.0, {"itl": (50.0, 60.0)}, completed=0))["held"]
    assert not peers._held(peers.Run(None, 1.0, 2.0, {}, "exit code 1"))["held"]


@pytest.mark.parametrize("limit", [0, 4, 30, 64, 100, 700, 5000])
def test_the_most_streams_are_found_within_a_quarter(peers, limit: int) -> None:
    found = peers.most_streams(lambda number: number <= limit)
    assert found <= limit
    assert found == peers.MOST or 1.25 * found + 1 > limit


@pytest.mark.timing
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="client and server need a core each")
def test_a_run_of_ours_ends_in_figures(tmp_path: Path) -> None:
    out = tmp_path / "peers.json"
    command = [sys.executable, str(STUDIES / "peers.py"), "--tools", "ours", "--streams", "6", "--chunks", "10"]
    done = subprocess.run([*command, "--no-most", "--out", str(out)], capture_output=True, text=True, check=True)
    (row,) = json.loads(out.read_text())["tools"]
    (level,) = row["levels"]
    assert level["completed"] * 10 <= level["tokens"][1]  # the warm-up is in the tokens and not in the figures
    assert set(level["figures"]) == {f"{name}_{p}" for name in ("ttft", "itl", "e2e") for p in ("p50", "p99")}
    assert level["figures"]["itl_p50"]["server"] == pytest.approx(50, abs=20)
    assert min(level["cpu_s"]) > 0.1
    assert "ours            6" in done.stdout
