"""A rendered report in headless Chromium: every chart is drawn, nothing is refused or thrown."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable

import pytest

from tuneship.bench.report.history import HistoryRow
from tuneship.bench.report.page import render, render_comparison, render_history
from tuneship.core.report import Comparison, GpuUse, Knee, LossPoint, NllResult, Report

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--virtual-time-budget=20000",
]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="NOT RUN: no chromium on this machine")


@pytest.fixture
def rich(make_report, make_level) -> Report:
    """Every chart and table, closed loop and trace among the levels."""
    levels = [
        _busy(make_level(rate, slower=slower, output_tokens_per_s=speed), slower, goodput)
        for rate, slower, speed, goodput in ((1, 1, 64, 1.0), (4, 1.3, 240, 0.98), (8, 2, 410, 0.9), (16, 7, 430, 0.21))
    ]
    levels.append(_busy(make_level(0, slower=3, arrivals="closed", concurrency=16, output_tokens_per_s=420), 3, 0.6))
    comparison = [
        Comparison(metric="8/s ttft_ms p50", a=81.2, b=92.4, ratio=1.138, worse_by=0.138, ci=(0.09, 0.19), margin=0.05,
                   p=0.002, pairs=12, verdict="regressed", detectable=0.04),
        Comparison(metric="json-fields score", a=0.9, b=0.89, ratio=0.989, unit="points", worse_by=0.01,
                   ci=(-0.02, 0.04), margin=0.03, p=0.3, pairs=200, verdict="cannot tell", detectable=0.045,
                   reason="the interval holds the margin", next_step="ask 450 items"),
        Comparison(metric="held-out nll", a=0.0712, b=0.0713, ratio=1.001, unit="nats", worse_by=0.0001,
                   ci=(-0.001, 0.0012), margin=0.01, p=1, pairs=200, verdict="no worse than the margin",
                   detectable=0.002),
    ]  # fmt: skip
    nll = [
        NllResult(data="/d/invoice.jsonl", model=role, role=role, rows=200, tokens=6012, nll=value, stderr=0.004,
                  items_file="n.jsonl")
        for role, value in (("base", 1.91), ("tuned", 0.0713))
    ]  # fmt: skip
    return make_report(
        load=levels,
        comparison=comparison,
        nll=nll,
        training=[LossPoint(step=n, loss=2 / n) for n in range(1, 60)],
        knee=Knee(rate=8, beyond=16, reason="goodput 0.21 < 0.95"),
    )


def _busy(level, slower: float, goodput: float):
    adapters = {
        name: {"requests": 20.0, "completed": 20.0, "ttft_ms_p50": 80 * slower, "goodput": goodput}
        for name in ("invoice-json", "support-tags")
    }
    timeline = [(n / 4, 80 * slower * (1 + n % 7 / 9), 1400 * slower * (1 + n % 5 / 9)) for n in range(120)]
    return level.model_copy(
        update={
            "timeline": timeline,
            "goodput": goodput,
            "slo_ms": {"ttft": 200.0, "tpot": 50.0},
            "per_adapter": adapters,
            "engine": {"sglang:num_running_reqs": 7.25, "sglang:cache_hit_rate": 0.31},
            "gpus": [GpuUse(name="NVIDIA H100", memory_peak_bytes=70 * 2**30, power_mean_w=412.5, energy_j=12375)],
        }
    )


@pytest.fixture
def browse(tmp_path) -> Callable[[str], tuple[str, str]]:
    """Open a page; its document after scripts ran, and what the browser's console said."""

    def browse(html: str) -> tuple[str, str]:
        page = tmp_path / "page.html"
        page.write_text(html)
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        command = [CHROMIUM, *FLAGS, profile, "--dump-dom", page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
        return done.stdout, console

    return browse


def _drawn(dom: str) -> dict[str, bool]:
    """{id of a chart: whether it holds a drawing with marks}."""
    parts = re.split(r'<div id="(\w+)" class="chart[^"]*"', dom.split("<script>", maxsplit=1)[0])[1:]
    return {name: "<svg" in rest and "<path" in rest for name, rest in zip(parts[::2], parts[1::2], strict=True)}


def test_every_chart_is_drawn_and_nothing_refused(rich, browse, tmp_path) -> None:
    dom, console = browse(render(rich, tmp_path))
    ecdfs, pairs = {"ttft_ms", "itl_ms", "e2e_ms"}, {"ttft_ms", "e2e_ms"}
    expected = {"loss"} | ecdfs | {f"{name}_{kind}" for name in pairs for kind in ("over_time", "curve")}
    assert _drawn(dom) == dict.fromkeys(expected, True)
    assert console == ""
    assert "8/s (knee)" in dom


def test_history_is_drawn(browse) -> None:
    figures = {"score": 0.9, "ttft_ms": 80.0, "tpot_ms": 20.0, "tokens_per_s": 85.0, "name": "a", "file": "r.json"}
    rows = [
        HistoryRow(created_at=f"2026-01-0{day} 03:04:05 UTC", digest=f"d{day % 2}", **figures) for day in range(1, 6)
    ]
    dom, console = browse(render_history(rows))
    assert _drawn(dom) == dict.fromkeys(("score", "ttft_ms", "tpot_ms", "tokens_per_s"), True)
    assert console == ""


def test_two_reports_are_shown(rich, browse, tmp_path) -> None:
    for name, score in (("old", 1), ("new", 0)):
        item = {"index": 0, "prompt": [{"role": "user", "content": "q"}], "reference": "r", "answer": name,
                "score": score, "error": ""}  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "items.jsonl").write_text(json.dumps(item))
    evals = [result for result in rich.eval if result.role == "tuned"]
    report = rich.model_copy(update={"eval": evals})
    sides = [(report, tmp_path / name / "report.json") for name in ("old", "new")]
    dom, console = browse(render_comparison(rich.comparison, *sides))
    assert console == ""
    assert "From right to wrong" in dom
    assert dom.count('<tr class="note">') == 1  # of the verdict that cannot be told
    assert '<p class="question">q</p>' in dom


def test_the_console_is_heard(browse) -> None:
    """What the other tests rely on: refusals and exceptions do reach the console that they read."""
    policy = "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; script-src 'unsafe-inline'\">"
    _, console = browse(f"{policy}<img src='https://example.invalid/x.png'><script>throw new Error('thrown')</script>")
    assert "Content Security Policy" in console
    assert "thrown" in console
