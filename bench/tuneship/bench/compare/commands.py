"""`tuneship bench compare`: the verb. Heavy libraries are imported when it runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tuneship.bench.parameters import Count, Positive
from tuneship.core.errors import ExitCode, RegressionFound, TuneshipError
from tuneship.core.progress import say
from tuneship.core.report import Comparison, read_report


def compare(
    baseline: str,
    candidate: str,
    *,
    model: str = "",
    candidate_model: str = "",
    pairs: Count = 12,
    rate: Positive = 4,
    duration_s: Positive = 15,
    input_tokens: Count = 128,
    output_tokens: Count = 32,
    latency_margin: Positive = 0.05,
    quality_margin: Positive = 0.02,
    allow_different_testbeds: bool = False,
    junit: Path | None = None,
    markdown: Path | None = None,
    key_env: str = "",
) -> None:
    """Tell whether a candidate is slower or worse than a baseline: two servers measured in turn, or two reports.

    Exits 0 when nothing is worse by more than its margin, 1 when something is, 3 when it cannot tell.

    Parameters
    ----------
    baseline
        A report.json or a folder with one; or a server's URL or endpoint.json, to measure both sides now.
    candidate
        What to judge, of the same kind.
    model
        Of servers: the name to send. Default: the first that the server lists.
    candidate_model
        The candidate's, so that two models of one server can be compared. Default: as for the baseline.
    pairs
        Of servers: blocks of load a side.
    rate
        Requests per second in a block.
    duration_s
        Seconds a block.
    input_tokens
        Words a prompt.
    output_tokens
        Tokens an answer.
    latency_margin
        Share by which latencies may grow and throughput may fall.
    quality_margin
        Points of score, in 0..1, that may be lost.
    allow_different_testbeds
        Compare reports although machine, versions or engine flags differ.
    junit
        File for the verdicts as JUnit XML.
    markdown
        File for the verdicts as a Markdown table.
    key_env
        Environment variable that holds the API key of both servers.

    """
    from tuneship.bench import tables  # noqa: PLC0415
    from tuneship.bench.compare import live, outputs, stored  # noqa: PLC0415
    from tuneship.bench.load.measure import LoadPlan, run_load  # noqa: PLC0415
    from tuneship.bench.target import resolve  # noqa: PLC0415

    servers = [_is_server(side) for side in (baseline, candidate)]
    if any(servers) and not all(servers):
        raise TuneshipError("a server and a report cannot be compared", hint="give two servers, or two reports")
    if all(servers):
        a, b = resolve(baseline, model, key_env), resolve(candidate, candidate_model or model, key_env)
        plan = LoadPlan((rate,), duration_s, "poisson", input_tokens, output_tokens)
        # run_load draws a new salt each time: no side is answered from what the other left in the prefix cache.
        blocks = live.measure_pairs(a, b, lambda side, seed: run_load(side, plan._replace(seed=seed))[0], pairs)
        rows = live.compare_pairs(blocks, latency_margin)
    else:
        rows = stored.compare(
            read_report(_report_file(Path(baseline))),
            read_report(_report_file(Path(candidate))),
            stored.Margins(latency_margin, quality_margin),
            allow_different_testbeds=allow_different_testbeds,
        )
    tables.show_comparison(rows)
    if junit:
        outputs.write_junit(rows, junit)
    if markdown:
        outputs.write_markdown(rows, markdown)
    _exit_by(rows)


def _is_server(where: str) -> bool:
    return "://" in where or Path(where).name == "endpoint.json"


def _exit_by(rows: Sequence[Comparison]) -> None:
    regressed = [row.metric for row in rows if row.verdict == "regressed"]
    if regressed:
        raise RegressionFound(f"regressed: {', '.join(regressed)}")
    if unknown := [row for row in rows if row.verdict == "cannot tell"]:
        steps = sorted({row.next_step for row in unknown if row.next_step})
        say("cannot tell whether the candidate is worse" + (f"; to decide: {', '.join(steps)}" if steps else ""))
        sys.exit(ExitCode.CANNOT_TELL)


def _report_file(path: Path) -> Path:
    return path / "report.json" if path.is_dir() else path
