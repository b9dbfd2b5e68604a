"""The verbs that measure: `tuneship bench load` (how fast), `eval` (how good), `nll` (how likely held-out answers are).

`bench compare` is in `compare/commands.py`, `bench history` in `report/commands.py`. Heavy libraries are imported when
a verb runs.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from tuneship.bench.parameters import Count, NotNegative, Positive, Rate
from tuneship.core.errors import DataError, TuneshipError
from tuneship.core.progress import say
from tuneship.core.recipe_bench import LM_EVAL_PREFIX
from tuneship.core.report import EvalResult, Knee, LoadResult, NllResult, Report, write_report

if TYPE_CHECKING:
    from tuneship.bench.target import Target


def load(
    url: str,
    *,
    model: str = "",
    rates: Annotated[tuple[Rate, ...], Parameter(consume_multiple=True, negative="")] = (),
    concurrency: Annotated[tuple[Count, ...], Parameter(consume_multiple=True, negative="")] = (),
    trace: str = "",
    duration_s: Positive = 30,
    warm_up_s: NotNegative = 0,
    arrivals: Literal["poisson", "constant"] = "poisson",
    workload: str = "fixed",
    input_tokens: Count = 128,
    prefix_tokens: Annotated[int, Parameter(validator=Number(gte=0))] = 0,
    output_tokens: Count = 64,
    adapters: str = "uniform",
    slo_ttft_ms: NotNegative = 0,
    slo_tpot_ms: NotNegative = 0,
    slo_e2e_ms: NotNegative = 0,
    processes: Count = 1,
    out: Path | None = None,
    key_env: str = "",
) -> None:
    """Measure latency and throughput under load.

    In an open loop (--rates, --trace) requests leave at their scheduled times whether or not earlier ones were
    answered; in a closed one (--concurrency) a fixed number is in flight. Works against any OpenAI-compatible server.

    Parameters
    ----------
    url
        A server's URL, an endpoint.json, or a run directory with one.
    model
        The name to send; several with commas between are mixed. Default: the only adapter that is served, or the only
        model where there is none.
    rates
        Requests per second, one load level each, or `sweep` to find the knee. Default: 1 4 16, where neither a trace
        nor a concurrency is given.
    concurrency
        Requests in flight, one level each.
    trace
        JSONL of recorded arrivals (`timestamp` in ms), replayed instead of rates.
    duration_s
        Seconds a level, after its warm-up.
    warm_up_s
        Seconds at the start of each level that count in no figure.
    arrivals
        Random (Poisson) or evenly spaced.
    workload
        fixed, shared-prefix, or a JSONL of {"prompt"} or {"messages"}.
    input_tokens
        Words a prompt; the report has the server's own token counts.
    prefix_tokens
        Words that all prompts of a shared-prefix workload begin with.
    output_tokens
        Tokens an answer.
    adapters
        How requests are spread over the models: uniform, zipf, or weights such as a=8,b=1.
    slo_ttft_ms
        Objective for goodput: time to first token.
    slo_tpot_ms
        Objective: time per output token.
    slo_e2e_ms
        Objective: end-to-end latency.
    processes
        Of the client, when one core is not enough.
    out
        Folder for report.json and report.html. Default: bench-TIME, in UTC.
    key_env
        Environment variable that holds the API key.

    """
    from tuneship.bench import tables  # noqa: PLC0415
    from tuneship.bench.load.measure import LoadPlan, measure  # noqa: PLC0415
    from tuneship.bench.target import resolve  # noqa: PLC0415

    target = resolve(url, model, key_env)
    folder = _choose_folder(out)
    plan = LoadPlan(
        _rates(rates, default=not (trace or concurrency)),
        duration_s,
        arrivals,
        input_tokens,
        output_tokens,
        concurrency=concurrency,
        trace=trace,
        workload=workload,
        prefix_tokens=prefix_tokens,
        adapters=_mix(adapters),
        warm_up_s=warm_up_s,
        slo_ms={"ttft": slo_ttft_ms, "tpot": slo_tpot_ms, "e2e": slo_e2e_ms},
        processes=processes,
    )
    measured = measure(target, plan)
    _write(target, folder, load=measured.levels, knee=measured.knee)
    tables.show_load(measured.levels)
    if measured.knee:
        say(f"knee: {measured.knee.rate:.3g}/s; beyond it {measured.knee.reason}")


def _rates(given: Sequence[float | Literal["sweep"]], *, default: bool) -> tuple[float, ...] | Literal["sweep"]:
    numbers = tuple(rate for rate in given if rate != "sweep")
    if len(numbers) < len(given):
        if len(given) > 1:
            raise TuneshipError("--rates takes numbers or `sweep`, not both")
        return "sweep"
    return numbers or ((1.0, 4.0, 16.0) if default else ())


def _mix(text: str) -> str | dict[str, float]:
    if text in {"uniform", "zipf"}:
        return text
    try:
        weights = {name: float(weight) for name, _, weight in (part.rpartition("=") for part in text.split(","))}
    except ValueError:
        weights = {}
    if not weights or not all(name and weight > 0 for name, weight in weights.items()):
        raise TuneshipError(f"--adapters {text!r} is no mix", hint="uniform, zipf, or weights such as a=8,b=1")
    return weights


def eval_(
    url: str,
    *,
    task: str,
    data: str = "",
    model: str = "",
    limit: Count = 200,
    max_tokens: Count | None = None,
    samples: Count = 1,
    temperature: float = 0,
    seed: int = 0,
    pattern: str = "",
    tolerance: float = 0,
    schema: Path | None = None,
    metric: str = "",
    num_fewshot: int | None = None,
    out: Path | None = None,
    key_env: str = "",
) -> None:
    """Score a model's answers to a file of questions.

    Cut off, it goes on where it stopped when it is started again with the same --out.

    Parameters
    ----------
    url
        A server's URL, an endpoint.json, or a run directory with one.
    task
        The scorer: exact, normalised, choice, regex, numeric, rouge-l, json-fields, json-schema, sql, or
        python:FILE.py:function (answer, reference, row -> 0..1); or lm-eval:NAME, lm-eval:FILE.yaml.
    data
        JSONL of chats ({"messages": [...]}) whose last message is the reference answer; lm-eval's tasks have their own.
    model
        The name to send. Default: the only adapter that is served, or the only model where there is none.
    limit
        Rows at most, from the first on.
    max_tokens
        Tokens an answer may have. Default: 128; for lm-eval's tasks what they say themselves.
    samples
        Answers an item; its score is their mean.
    temperature
        0 is greedy; above 0 where there are several samples.
    seed
        Of the first sample; the next has the next.
    pattern
        regex: what must be found alike in answer and reference; its first group, where it has one.
    tolerance
        numeric: by how much the numbers may differ.
    schema
        json-schema: the schema's file, for rows without one of their own.
    metric
        lm-eval: the metric that is the score, as `name` or `name,filter`. Default: the task's first.
    num_fewshot
        lm-eval: examples in the prompt. Default: what the task says.
    out
        Folder for report.json, report.html and the answers. Default: bench-TIME, in UTC.
    key_env
        Environment variable that holds the API key.

    """
    from tuneship.bench import tables  # noqa: PLC0415
    from tuneship.bench.quality.evaluate import Task, evaluate  # noqa: PLC0415
    from tuneship.bench.target import resolve  # noqa: PLC0415

    if samples > 1 and temperature <= 0:
        raise DataError("several samples at temperature 0 are all the same", hint="give --temperature 0.7")
    if bool(data) == task.startswith(LM_EVAL_PREFIX):
        has = "takes no --data: it names its own" if data else "needs --data"
        raise DataError(f"--task {task} {has}")
    given: dict[str, str | float] = {
        "pattern": pattern,
        "tolerance": tolerance,
        "schema": str(schema) if schema else "",
        "metric": metric,
    }
    options = {name: value for name, value in given.items() if value}
    if num_fewshot is not None:
        options["num_fewshot"] = num_fewshot
    target = resolve(url, model, key_env)
    folder = _choose_folder(out)
    rows = str(Path(data).resolve()) if data else ""
    asked = Task(task, rows, limit, max_tokens or 0, samples, temperature, seed, options)
    result = evaluate(target, asked, folder)
    _write(target, folder, evals=[result])
    tables.show_evals([result])


def nll(
    url: str,
    *,
    data: str,
    model: str = "",
    limit: Count = 200,
    out: Path | None = None,
    key_env: str = "",
) -> None:
    """Measure how likely a model finds known answers, in nats per token; needs a server of `tuneship serve`.

    Parameters
    ----------
    url
        A server's URL, an endpoint.json, or a run directory with one.
    data
        An artifact's evidence/reference.jsonl, of which the tokens with loss count, or a JSONL of chats whose last
        message is the answer: its tokens count, end of turn included, as in training.
    model
        The name to send. Default: the only adapter that is served, or the only model where there is none.
    limit
        Rows at most, from the first on.
    out
        Folder for report.json, report.html and the figures by row. Default: bench-TIME, in UTC.
    key_env
        Environment variable that holds the API key.

    """
    from tuneship.bench import tables  # noqa: PLC0415
    from tuneship.bench.quality.nll import measure_nll  # noqa: PLC0415
    from tuneship.bench.target import resolve  # noqa: PLC0415

    target = resolve(url, model, key_env)
    folder = _choose_folder(out)
    result = measure_nll(target, str(Path(data).resolve()), folder, limit)
    _write(target, folder, nlls=[result])
    tables.show_nll([result])


def _choose_folder(out: Path | None) -> Path:
    folder = out or Path(f"bench-{datetime.now(UTC):%Y%m%dT%H%M%SZ}")
    if (folder / "report.json").exists():
        raise TuneshipError(f"{folder} already holds a report", hint="name another folder with --out")
    return folder


def _write(
    target: Target,
    folder: Path,
    *,
    load: list[LoadResult] | None = None,
    knee: Knee | None = None,
    evals: list[EvalResult] | None = None,
    nlls: list[NllResult] | None = None,
) -> None:
    from tuneship.bench import testbed  # noqa: PLC0415
    from tuneship.bench.stages import now  # noqa: PLC0415

    report = Report(
        name=target.model,
        created_at=now(),
        testbed=testbed.describe(target),
        endpoint=target.as_record(),
        load=load or [],
        knee=knee,
        eval=evals or [],
        nll=nlls or [],
        provenance={"command": shlex.join(["tuneship", *sys.argv[1:]])},
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_report(report, folder / "report.json")
    from tuneship.bench.report.page import write_html  # noqa: PLC0415 - after what was measured is safe on disk

    write_html(report, folder / "report.html")
    say(f"report: {folder / 'report.html'}")
