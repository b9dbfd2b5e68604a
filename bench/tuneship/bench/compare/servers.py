"""Two servers, or two models of one: everything that is asked of both, and the verdicts.

    found = compare(a, b, Plan(load, pairs=12), Margins(), alpha=0.05, command="tuneship bench compare A B", out=None)
    found.rows, found.pace

Speed is measured in pairs of blocks (`live.py`); then both answer the same items and score the same rows.
"""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from tuneship.bench import testbed
from tuneship.bench.compare import live
from tuneship.bench.compare.again import Again, Pace
from tuneship.bench.compare.calibration import measurement, read_calibration
from tuneship.bench.compare.live import Pair
from tuneship.bench.compare.quality import Side, weigh_nll, weigh_scores
from tuneship.bench.compare.stored import Margins
from tuneship.bench.compare.verdict import Evidence, judge
from tuneship.bench.load.measure import LoadPlan, measure_block, warm_up
from tuneship.bench.quality.evaluate import Task, evaluate
from tuneship.bench.quality.nll import measure_nll
from tuneship.bench.stages import moved, now
from tuneship.bench.target import Target
from tuneship.core.errors import TuneshipError
from tuneship.core.files import write_atomic
from tuneship.core.progress import say
from tuneship.core.report import Comparison, EvalResult, NllResult, Report, write_report


class Plan(NamedTuple):
    """What both sides are asked."""

    load: LoadPlan
    """One rate, or one concurrency."""
    pairs: int = 0
    """0: as many as the testbed's calibration asks for."""
    tasks: tuple[Task, ...] = ()
    nll: str = ""
    """A file of held-out rows; empty: none."""
    limit: int = 200
    """Items of a task, and rows of `nll`, at most."""


class Compared(NamedTuple):
    """Every metric's verdict, and how long it took."""

    rows: list[Comparison]
    pace: Pace


class _Answered(NamedTuple):
    evidence: list[Evidence]
    evals: list[EvalResult]
    nlls: list[NllResult]


def compare(
    a: Target, b: Target, plan: Plan, margins: Margins, alpha: float, command: str, out: Path | None
) -> Compared:
    """Measure both sides and judge every metric; with `out`, keep a report, the blocks and the answers.

    `command` is what measures this again, but for `--limit` and `--pairs`.

    Raises:
        TuneshipError: `out` holds a report already.
        EndpointError: a side stopped answering.
        DataError: the task's or the held-out rows cannot be used.

    """
    if out and (out / "report.json").exists():
        raise TuneshipError(f"{out} already holds a report", hint="name another folder with --out")
    with nullcontext(str(out)) if out else tempfile.TemporaryDirectory() as kept:
        folder = Path(kept)
        began = time.monotonic()
        pairs = measure(a, b, plan, alpha, margins.latency)
        measured = time.monotonic()
        again = Again(command, plan.limit, len(pairs), asks=bool(plan.tasks or plan.nll))
        answered = _ask(a, b, plan, margins, alpha, again, folder)
        items = max([1, *(one.items for one in answered.evals), *(one.rows for one in answered.nlls)])
        pace = Pace((measured - began) / len(pairs), (time.monotonic() - measured) / items)
        rows = judge([*live.weigh_pairs(pairs, margins.latency, alpha, again), *answered.evidence], alpha)
        if out:
            _write(a, b, pairs, rows, answered, folder)
    return Compared(rows, pace)


def measure(a: Target, b: Target, plan: Plan, alpha: float, margin: float) -> list[Pair]:
    """Warm both up, then measure the pairs.

    Raises:
        EndpointError: a side did not answer.

    """
    answer_s = min(warm_up(side, plan.load) for side in ([a] if a == b else [a, b]))
    first = measure_block(a, plan.load, answer_s)  # the first block after a pause is no block like the others
    calibration = read_calibration(testbed.describe(a))
    pairs = plan.pairs or live.plan_pairs(calibration, first, margin, alpha)
    say(f"{pairs} pairs of blocks of {plan.load.duration_s:g} s, in turn")
    return live.measure_pairs(
        a, b, lambda side, seed: measure_block(side, plan.load._replace(seed=seed), answer_s), pairs
    )


def _ask(a: Target, b: Target, plan: Plan, margins: Margins, alpha: float, again: Again, folder: Path) -> _Answered:
    found = _Answered([], [], [])
    sides = (a, folder / "baseline"), (b, folder / "candidate")
    for task in plan.tasks:
        before, after = (Side(evaluate(target, task, place), place) for target, place in sides)
        found.evidence.append(weigh_scores(before, after, margins.quality, alpha, again))
        found.evals.extend(one for side in (before, after) for one in moved([side.result], side.folder, folder))
    if plan.nll:
        first, second = (Side(measure_nll(target, plan.nll, place, plan.limit), place) for target, place in sides)
        found.evidence.append(weigh_nll(first, second, margins.nll, alpha, again))
        found.nlls.extend(one for side in (first, second) for one in moved([side.result], side.folder, folder))
    return found


def _write(
    a: Target, b: Target, pairs: Sequence[Pair], rows: Sequence[Comparison], answered: _Answered, folder: Path
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    sides = ({name: measurement(level, "") for name, level in pair._asdict().items()} for pair in pairs)
    lines = ({name: side.values if side else None for name, side in pair.items()} for pair in sides)
    write_atomic(folder / "pairs.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    report = Report(
        name=f"{a.model} against {b.model}",
        created_at=now(),
        testbed=testbed.describe(a),
        endpoint={"baseline": a.as_record(), "candidate": b.as_record()},
        eval=answered.evals,
        nll=answered.nlls,
        comparison=list(rows),
        provenance={"command": shlex.join(["tuneship", *sys.argv[1:]])},
    )
    write_report(report, folder / "report.json")
    say(f"report: {folder / 'report.json'}")
