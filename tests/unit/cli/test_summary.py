"""What `up` prints at its end, as a person reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from tuneship.cli import summary
from tuneship.core import report
from tuneship.core.parity import Parity
from tuneship.core.report import ClientHealth, EvalResult, LoadResult, NllResult, Percentiles, Report

TESTBED = report.Testbed.build(gpu="none", cpu="c", driver="", versions={}, flags=[])
MS = Percentiles(p50=1234.56, p90=1, p95=1, p99=2345.6, mean=1)
LEVEL = LoadResult(
    workload="fixed", model="m", arrivals="poisson", rate=4, requests=40, completed=39, duration_s=10, input_tokens=1,
    output_tokens=1, ttft_ms=MS, tpot_ms=None, itl_ms=None, e2e_ms=None, output_tokens_per_s=85.25,
    client=ClientHealth(lag_p99_ms=1, valid=True),
)  # fmt: skip
PARITY = Parity(
    reference="trained", candidate="merged", rows=2, tokens=6012, nll_base=2, nll_reference=0.07, nll=0.0725,
    kl_mean=0.002, kl_p99=0, limit=0.02, passed=True,
)  # fmt: skip


def _eval(role: str, score: float) -> EvalResult:
    return EvalResult(task="sql", data="d", model="m", role=role, items=9, score=score, stderr=0.01, items_file="i")


def _nll(role: str, value: float) -> NllResult:
    return NllResult(
        data="/d/held.jsonl", model="m", role=role, rows=9, tokens=5012, nll=value, stderr=0.002, items_file="i"
    )


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """What is printed of a report, by line, runs of blanks as one."""
    monkeypatch.setattr(summary, "out", Console(width=160))

    def lines(**parts) -> list[str]:
        summary.show(Report(name="n", created_at="now", testbed=TESTBED, **parts), Path("runs/n"))
        return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]

    return lines


def test_everything_that_was_measured(printed):
    assert printed(
        eval=[_eval("base", 0.25), _eval("tuned", 0.9)],
        nll=[_nll("base", 1.5), _nll("tuned", 0.25)],
        load=[LEVEL],
        parity=PARITY,
    ) == [
        "task model items score",
        "sql base 9 0.250 ± 0.010",
        "sql tuned 9 0.900 ± 0.010",
        "held-out text model tokens NLL perplexity",
        "held.jsonl base 5,012 1.5000 ± 0.0020 4.482",
        "held.jsonl tuned 5,012 0.2500 ± 0.0020 1.284",
        "offered completed TTFT p50 / p99 ms TPOT p50 / p99 ms output tok/s",
        "4/s 39/40 1,234.6 / 2,345.6 - 85.2",
        "parity merged is +0.0025 nats/token from trained over 6,012 held-out tokens (limit 0.02), KL 0.0020",
        "report runs/n/report.html",
    ]


def test_what_was_not_measured_has_no_table(printed):
    assert printed() == ["report runs/n/report.html"]


def test_goodput_and_a_client_that_was_too_slow(printed):
    slow = LEVEL.model_copy(update={"goodput": 0.5, "client": ClientHealth(lag_p99_ms=99, valid=False)})
    head, slow_line, line, _ = printed(load=[slow, LEVEL])
    assert head.endswith("output tok/s goodput")
    assert slow_line.endswith("85.2 (client too slow: invalid) 50.0%")
    assert line.endswith("85.2 -")


def test_a_plan(capsys: pytest.CaptureFixture[str]):
    summary.show_plan({"rows": 1200, "micro_batch": 8, "peak_bytes": 3 * 2**30, "dtype": "bfloat16"})
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == ["plan", "rows 1,200", "micro batch 8", "peak 3.0 GiB", "dtype bfloat16"]
