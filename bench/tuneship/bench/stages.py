"""The two measuring stages of `tuneship up`: the base before anything else changes, the tuned model at the end.

inputs: `endpoint` (an `endpoint.json`), `model` (the name to send) and, where there is one, `artifact` (what was
trained, with its evidence) and `heldout` (the conversations that training held out, as messages) for both; for `bench`
also `train_attempt` (its metrics.jsonl) and `baseline` (what that stage wrote).

Did held-out likelihood get better? Both stages score the rows of the artifact's `evidence/reference.jsonl`, not
`data.heldout` as chats: these are the token ids that training cut and parity was measured on, whatever format the data
has and whichever turns carry loss, end of turn included. So base and tuned are asked about the same tokens even if
their servers would render a chat differently, and the figures stand beside parity's.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from tuneship.bench import testbed
from tuneship.bench.load.measure import LoadPlan, Measured, measure
from tuneship.bench.quality.evaluate import Role, Task, evaluate
from tuneship.bench.quality.nll import CannotScore, measure_nll
from tuneship.bench.quality.tasks import read_rows
from tuneship.bench.target import Target, resolve
from tuneship.core import recipe_file
from tuneship.core.artifact import Artifact, open_artifact
from tuneship.core.errors import DataError
from tuneship.core.parity import REFERENCE_FILE, Parity
from tuneship.core.progress import say
from tuneship.core.recipe import Recipe
from tuneship.core.report import EvalResult, LossPoint, NllResult, Report, read_report, write_report
from tuneship.core.stage import Job

BASELINE_FILE = "eval.json"

_Measured = TypeVar("_Measured", EvalResult, NllResult)


def baseline(job: Job) -> Path:
    """Score the base on the recipe's tasks and held-out rows; the result is a report with nothing else."""
    target = _target(job)
    report = Report(
        name=job.recipe.name,
        created_at=now(),
        testbed=testbed.describe(target),
        eval=_evaluate(target, job, "base"),
        nll=_measure_nll(target, job, _artifact(job), "base"),
    )
    output = job.attempt / BASELINE_FILE
    write_report(report, output)
    return output


def bench(job: Job) -> Path:
    """Load and score the tuned model; writes the run's `report.json` and `report.html`."""
    from tuneship.bench.report.page import write_html  # noqa: PLC0415 - 2 s of altair that `baseline` need not wait for

    target = _target(job)
    artifact = _artifact(job)
    tuned = _evaluate(target, job, "tuned")
    likelihood = _measure_nll(target, job, artifact, "tuned")
    load = _measure_load(target, job, artifact)
    base_evals, base_nlls = _read_baseline(job)
    report = Report(
        name=job.recipe.name,
        created_at=now(),
        testbed=testbed.describe(target),
        endpoint=target.as_record(),
        training=read_training(Path(job.inputs["train_attempt"])) if "train_attempt" in job.inputs else [],
        load=load.levels if load else [],
        knee=load.knee if load else None,
        eval=[*base_evals, *moved(tuned, job.attempt, job.run_path)],
        nll=[*base_nlls, *moved(likelihood, job.attempt, job.run_path)],
        parity=newest_parity(artifact.evidence) if artifact else None,
        provenance=_provenance(job, artifact),
    )
    write_report(report, job.run.report)
    write_html(report, job.run.report.with_suffix(".html"))
    return job.run.report


def now() -> str:
    """This moment in UTC, as reports write it."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def read_training(attempt: Path) -> list[LossPoint]:
    """The training steps that `metrics.jsonl` logged; lines of another kind are passed over."""
    file = attempt / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    points = []
    for line in lines:
        try:
            point = LossPoint.model_validate(json.loads(line))
        except (json.JSONDecodeError, ValidationError):
            continue
        if math.isfinite(point.loss):  # JSON has no NaN
            points.append(point)
    return points


def newest_parity(evidence: Path) -> Parity | None:
    """The last appended parity verdict; None without one."""
    files = sorted(evidence.glob("parity-*.json"), key=lambda file: int(file.stem.removeprefix("parity-")))
    return Parity.model_validate_json(files[-1].read_text(encoding="utf-8")) if files else None


def moved(results: Sequence[_Measured], source: Path, destination: Path) -> list[_Measured]:
    """The same results with their items files named as seen from `destination`, so that a run can be moved."""
    return [
        result.model_copy(update={"items_file": os.path.relpath(source / result.items_file, destination)})
        for result in results
    ]


def _artifact(job: Job) -> Artifact | None:
    return open_artifact(Path(job.inputs["artifact"]), verify=False) if "artifact" in job.inputs else None


def _target(job: Job) -> Target:
    return resolve(job.inputs["endpoint"], job.inputs["model"])


def _evaluate(target: Target, job: Job, role: Role) -> list[EvalResult]:
    seed = job.recipe.train.seed
    tasks = [
        Task(t.task, _rows_of(t.data, job), t.limit, t.max_tokens, t.samples, t.temperature, seed, t.options)
        for t in job.recipe.bench.eval
    ]
    return [evaluate(target, task, job.attempt, role) for task in tasks]


def _rows_of(data: str, job: Job) -> str:
    """The task's own file; for held-out rows in another format what training made of them."""
    heldout = job.inputs.get("heldout", "")
    if not heldout or data != job.recipe.data.heldout:
        return data
    try:
        read_rows(data, limit=1)
    except DataError:
        return heldout
    return data


def _measure_nll(target: Target, job: Job, artifact: Artifact | None, role: Role) -> list[NllResult]:
    """Of all rows of the artifact's reference; none, saying so, where there are no rows or the server cannot score."""
    reference = artifact.evidence / REFERENCE_FILE if artifact else None
    if reference is None or not reference.is_file():
        say("no held-out rows: their likelihood is not measured")
        return []
    try:
        found = measure_nll(target, str(reference), job.attempt, limit=sys.maxsize, role=role)
    except CannotScore as error:
        say(f"held-out likelihood is not measured: {error.message}")
        return []
    # To a reader they are rows of the held-out file; the evidence's own name tells nothing.
    return [found.model_copy(update={"data": job.recipe.data.heldout or found.data})]


def _measure_load(target: Target, job: Job, artifact: Artifact | None) -> Measured | None:
    """None, saying so, where nobody can ask the model a chat: trained on plain text, it may have no template."""
    if artifact and not artifact.manifest.template.text:
        say("the model has no chat template: no load is sent to it (data.template would give it one)")
        return None
    return measure(target, _load_plan(job.recipe, job.inputs.get("heldout", "")))


def _load_plan(recipe: Recipe, heldout: str) -> LoadPlan:
    """`heldout` is empty in a run that was trained before rows came in other formats."""
    load = recipe.bench.load
    return LoadPlan(
        rates=load.rates,
        duration_s=load.duration_s,
        arrivals=load.arrivals,
        input_tokens=load.input_tokens,
        output_tokens=load.output_tokens,
        seed=recipe.train.seed,
        concurrency=load.concurrency,
        trace=load.trace,
        workload=load.workload,
        prefix_tokens=load.prefix_tokens,
        heldout=heldout or recipe.data.heldout,
        adapters=load.adapters,
        warm_up_s=load.warm_up_s,
        slo_ms={"ttft": load.slo.ttft_ms, "tpot": load.slo.tpot_ms, "e2e": load.slo.e2e_ms},
        processes=load.processes,
    )


def _read_baseline(job: Job) -> tuple[list[EvalResult], list[NllResult]]:
    if "baseline" not in job.inputs:
        return [], []
    file = Path(job.inputs["baseline"])
    found = read_report(file)
    return moved(found.eval, file.parent, job.run_path), moved(found.nll, file.parent, job.run_path)


def _provenance(job: Job, artifact: Artifact | None) -> dict[str, str]:
    command = job.run_path / "command.txt"
    found = {
        "command": command.read_text(encoding="utf-8").strip() if command.is_file() else "",
        "recipe digest": recipe_file.digest(job.recipe)[:16],
    }
    if artifact:
        base = artifact.manifest.base
        found |= {
            "artifact": f"{artifact.path.name} (content id {artifact.manifest.content_id})",
            "made from": ", ".join(artifact.manifest.parents),
            "base": f"{base.id} {base.revision}, weights {base.weights_sha256[:16]}",
        }
    return {name: value for name, value in found.items() if value}
