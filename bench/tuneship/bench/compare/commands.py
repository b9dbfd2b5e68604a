"""`tuneship bench compare | calibrate`: the verbs. Heavy libraries are imported when they run."""

from __future__ import annotations

import inspect
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from tuneship.bench.parameters import Alpha, Count, Positive
from tuneship.core.errors import EndpointError, ExitCode, RegressionFound, TuneshipError
from tuneship.core.progress import say
from tuneship.core.recipe_bench import LM_EVAL_PREFIX
from tuneship.core.report import Comparison, Report, Testbed, read_report

if TYPE_CHECKING:
    from tuneship.bench.compare.stored import Stored
    from tuneship.bench.load.measure import LoadPlan
    from tuneship.bench.quality.evaluate import Task


@Parameter(name="*")
@dataclass(frozen=True)
class BlockLoad:
    """The load of one block.

    Parameters
    ----------
    rate
        Requests per second, at random times.
    concurrency
        Requests in flight instead of a rate; steadier, so that smaller differences are found.
    duration_s
        Seconds a block.
    workload
        fixed, or a JSONL of {"prompt"} or {"messages"}.
    input_tokens
        Words a prompt.
    output_tokens
        Tokens an answer.

    """

    rate: Positive = 4
    concurrency: Annotated[int, Parameter(validator=Number(gte=0))] = 0
    duration_s: Positive = 15
    workload: str = "fixed"
    input_tokens: Count = 128
    output_tokens: Count = 32


@Parameter(name="*")
@dataclass(frozen=True)
class Questions:
    """What else both servers are asked.

    Parameters
    ----------
    task
        A scorer, as in `bench eval`.
    data
        The task's rows.
    limit
        Rows of it at most, and of --nll.
    max_tokens
        Tokens an answer of the task may have. Default: 128, or an lm-eval task's own.
    nll
        Held-out rows whose likelihood both are asked for, as in `bench nll`.

    """

    task: str = ""
    data: str = ""
    limit: Count = 200
    max_tokens: Annotated[int, Parameter(validator=Number(gte=0))] = 0
    nll: str = ""


def compare(
    baseline: str,
    candidate: str,
    *,
    model: str = "",
    candidate_model: str = "",
    pairs: Annotated[int, Parameter(validator=Number(gte=0))] = 0,
    block: BlockLoad = BlockLoad(),
    questions: Questions = Questions(),
    latency_margin: Positive = 0.05,
    quality_margin: Positive = 0.02,
    nll_margin: Positive = 0.02,
    alpha: Alpha = 0.05,
    allow_different_testbeds: bool = False,
    out: Path | None = None,
    junit: Path | None = None,
    markdown: Path | None = None,
    html: Path | None = None,
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
        Of servers: the name to send. Default: the only adapter that is served, or the only model where there is none.
    candidate_model
        The candidate's, so that two models of one server can be compared. Default: as for the baseline.
    pairs
        Of servers: blocks of load a side. Default: as many as the testbed's calibration asks for, or 12 without one.
    block
        Of servers: the load of a block.
    questions
        Of servers: what else both are asked.
    latency_margin
        Share by which latencies may grow and throughput may fall.
    quality_margin
        Points of score, in 0..1, that may be lost.
    nll_margin
        Nats per token by which held-out text may become less likely.
    alpha
        Chance that a comparison of equals finds any metric regressed.
    allow_different_testbeds
        Compare reports although machine, versions or engine flags differ.
    out
        Of servers: folder for report.json and what every item was answered. Default: nothing is kept.
    junit
        File for the verdicts as JUnit XML.
    markdown
        File for the verdicts as a Markdown table.
    html
        Of reports: file for a page with the verdicts and the answers that changed.
    key_env
        Environment variable that holds the API key of both servers.

    """
    from tuneship.bench import tables  # noqa: PLC0415
    from tuneship.bench.compare import outputs, servers, stored  # noqa: PLC0415
    from tuneship.bench.compare.calibration import read_calibration  # noqa: PLC0415
    from tuneship.bench.compare.verdict import judge  # noqa: PLC0415
    from tuneship.bench.target import resolve  # noqa: PLC0415

    are_servers = [_is_server(side) for side in (baseline, candidate)]
    if any(are_servers) and not all(are_servers):
        raise TuneshipError("a server and a report cannot be compared", hint="give two servers, or two reports")
    needs_data = bool(questions.task) and not questions.task.startswith(LM_EVAL_PREFIX)
    if needs_data != bool(questions.data):
        raise TuneshipError(
            "a task needs data, and data needs a task", hint="give both --task and --data (lm-eval's have their own)"
        )
    if html and all(are_servers):
        raise TuneshipError("--html shows two reports", hint="of two servers, --out keeps a report")
    margins = stored.Margins(latency_margin, quality_margin, nll_margin)
    if all(are_servers):
        a, b = resolve(baseline, model, key_env), resolve(candidate, candidate_model or model, key_env)
        plan = servers.Plan(_load_plan(block), pairs, _tasks(questions), questions.nll, questions.limit)
        named = {"model": model, "candidate_model": candidate_model, "key_env": key_env}
        judged = {"latency_margin": latency_margin, "quality_margin": quality_margin, "nll_margin": nll_margin}
        given = _given(asdict(block) | asdict(questions) | named | judged | {"alpha": alpha})
        command = shlex.join(["tuneship", "bench", "compare", baseline, candidate, *given])
        rows, pace = servers.compare(a, b, plan, margins, alpha, command, out)
    else:
        before, after = _read(Path(baseline)), _read(Path(candidate))
        known = read_calibration(before.report.testbed)
        found = stored.weigh(before, after, margins, known, alpha, allow_different_testbeds=allow_different_testbeds)
        rows, pace = judge(found, alpha), None
        if html:
            from tuneship.bench.report.page import write_comparison_html  # noqa: PLC0415 - 2 s of altair

            write_comparison_html(rows, before, after, html)
    tables.show_comparison(rows, pace)
    if junit:
        outputs.write_junit(rows, junit)
    if markdown:
        outputs.write_markdown(rows, markdown)
    _exit_by(rows)


def calibrate(
    *where: str,
    model: str = "",
    pairs: Count = 12,
    block: BlockLoad = BlockLoad(),
    latency_margin: Positive = 0.05,
    alpha: Alpha = 0.05,
    key_env: str = "",
) -> None:
    """Measure how noisy this testbed is, which `bench compare` then knows: a server against itself, or its reports.

    A server is measured in pairs of blocks, as two are compared. Reports of the same thing on one testbed show how far
    two runs differ, restarts included: give all you have. What is measured is added to what is known of the testbed.

    Parameters
    ----------
    where
        A server's URL or endpoint.json; or reports of the same thing.
    model
        Of a server: the name to send. Default: the only adapter that is served, or the only model where there is none.
    pairs
        Of a server: blocks of load a side.
    block
        Of a server: the load of a block.
    latency_margin
        Share for which the pairs are told that it takes to decide about it.
    alpha
        As in `bench compare`.
    key_env
        Environment variable that holds the API key.

    """
    from tuneship.bench import tables, testbed  # noqa: PLC0415
    from tuneship.bench.compare import calibration, live, servers  # noqa: PLC0415
    from tuneship.bench.stages import now  # noqa: PLC0415
    from tuneship.bench.target import resolve  # noqa: PLC0415

    if len(where) == 1 and _is_server(where[0]):
        target, started = resolve(where[0], model, key_env), now()
        measured = servers.measure(target, target, servers.Plan(_load_plan(block), pairs), alpha, latency_margin)
        blocks = [level for pair in measured for level in pair]
        found = [calibration.measurement(level, started, index) for index, level in enumerate(blocks)]
        bed = testbed.describe(target)
    else:
        reports = [_read(Path(one)).report for one in where]
        bed = _one_testbed(reports)
        found = [calibration.measurement(level, report.created_at) for report in reports for level in report.load]
    kept = [one for one in found if one]
    if len(kept) < len(found):
        say(f"{len(found) - len(kept)} of {len(found)} measurements say nothing (errors, or a client that lagged)")
    known = calibration.add_measurements(bed, kept)
    tables.show_calibration(live.expected_noise(known, latency_margin, alpha))
    say(f"calibration: {calibration.calibration_file(bed)}")


def _load_plan(block: BlockLoad) -> LoadPlan:
    from tuneship.bench.load.measure import LoadPlan  # noqa: PLC0415

    closed = (block.concurrency,) if block.concurrency else ()
    return LoadPlan(
        () if closed else (block.rate,),
        block.duration_s,
        "poisson",
        block.input_tokens,
        block.output_tokens,
        concurrency=closed,
        workload=block.workload,
    )


def _tasks(questions: Questions) -> tuple[Task, ...]:
    from tuneship.bench.quality.evaluate import Task  # noqa: PLC0415

    if not questions.task:
        return ()
    data = str(Path(questions.data).resolve()) if questions.data else ""
    return (Task(questions.task, data, questions.limit, questions.max_tokens),)


def _given(options: Mapping[str, object]) -> list[str]:
    """Of `options` those that say what is measured and judged, as far as they are not the usual ones."""
    names = inspect.signature(compare).parameters
    usual = {name: names[name].default for name in options if name in names}
    usual |= asdict(BlockLoad()) | asdict(Questions())
    chosen = {name: value for name, value in options.items() if value != usual[name] and name != "limit"}
    written = {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in chosen.items()}
    return [word for name, value in written.items() for word in (f"--{name.replace('_', '-')}", value)]


def _one_testbed(reports: Sequence[Report]) -> Testbed:
    from tuneship.bench.testbed import differences  # noqa: PLC0415

    if not reports:
        raise TuneshipError("nothing to calibrate from", hint="give a server's URL, or reports of the same thing")
    first = reports[0].testbed
    for other in reports[1:]:
        if apart := differences(first, other.testbed):
            raise EndpointError(f"the reports were measured on different testbeds: {'; '.join(apart)}")
    return first


def _is_server(where: str) -> bool:
    return "://" in where or Path(where).name == "endpoint.json"


def _exit_by(rows: Sequence[Comparison]) -> None:
    regressed = [row.metric for row in rows if row.verdict == "regressed"]
    if regressed:
        raise RegressionFound(f"regressed: {', '.join(regressed)}")
    if any(row.verdict == "cannot tell" for row in rows):
        say("cannot tell whether the candidate is worse")
        sys.exit(ExitCode.CANNOT_TELL)


def _read(path: Path) -> Stored:
    from tuneship.bench.compare.stored import Stored  # noqa: PLC0415

    file = path / "report.json" if path.is_dir() else path
    return Stored(read_report(file), file)
