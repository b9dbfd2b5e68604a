"""`up` and its parts: verbs that read a recipe and work in a run directory."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from tuneship.cli import closing, summary
from tuneship.cli import dry_run as dry
from tuneship.cli import overrides as dotted
from tuneship.cli.pipeline import Pipeline, Target, identify
from tuneship.cli.settling import serves, settle
from tuneship.core import extras, recipe_file
from tuneship.core.artifact import Artifact, open_artifact
from tuneship.core.errors import ArtifactError
from tuneship.core.files import write_atomic
from tuneship.core.progress import say
from tuneship.core.report import read_report
from tuneship.core.rundir import RunDir, locked

Overrides = Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]
Smoke = Annotated[int, Parameter(validator=Number(gte=0))]
From = Literal["train", "merge", "bench"]
Until = Literal["train", "merge", "serve", "bench"]
# In the order in which they run; the base is measured before the tuned model.
_STAGES = ("train", "merge", "baseline", "bench")
_ROOMS: dict[Until, tuple[str, ...]] = {
    "train": ("train",),
    "merge": ("train",),
    "serve": ("train", "serve"),
    "bench": ("train", "serve", "bench"),
}
"""What must be installed; it is asked before hours of training."""


def up(
    recipe: Path,
    *overrides: Overrides,
    from_: Annotated[From | None, Parameter(name="--from")] = None,
    until: Until = "bench",
    keep_serving: bool = False,
    run: Path | None = None,
    dry_run: bool = False,
    force: bool = False,
    resume: bool = False,
    smoke: Smoke = 0,
) -> None:
    """Train, merge, serve and bench a recipe in one command; what is done already is kept.

    At its end everything that it started is ended too, unless it is told to keep serving.

    Parameters
    ----------
    recipe
        The recipe's TOML file.
    overrides
        Any recipe key: --lora.rank 8 --train.steps 20.
    from_
        Run this stage and those after it again, although nothing changed.
    until
        Stop after this stage: train and merge leave an artifact, serve serves until Ctrl-C without measuring.
    keep_serving
        Leave the server up after the bench, until Ctrl-C.
    run
        The run directory (default: runs/NAME, as the recipe names itself).
    dry_run
        Print the resolved recipe, the plan and what would be done, and do nothing.
    force
        Keep a merged checkpoint that failed parity; the failure is recorded in its evidence.
    resume
        Let training go on from the last checkpoint of one that was stopped; the recipe and its data must be the same.
    smoke
        Only train, one pass over so many rows (8 steps at least, at most those of the recipe), in a run directory of
        its own, and fail unless the loss falls.

    """
    resolved = recipe_file.load(recipe, dotted.parse(overrides))
    if resolved.bench.gate.baseline:
        read_report(Path(resolved.bench.gate.baseline))  # before hours of training
    until = "train" if smoke else until
    folder = run or Path("runs") / (f"{resolved.name}-smoke" if smoke else resolved.name)
    forgotten = _STAGES[_STAGES.index(from_) :] if from_ else ()
    if dry_run:
        dry.show(Pipeline(RunDir(folder.resolve()), resolved, force, resume, smoke), until, forgotten)
        return
    extras.require(*_ROOMS[until])
    with locked(RunDir(folder.resolve())) as held:
        say(f"run {folder}")  # before the first stage has loaded its libraries
        recipe_file.save(resolved, held.recipe)
        write_atomic(held.path / "command.txt", shlex.join(["tuneship", *sys.argv[1:]]) + "\n")
        held.forget(forgotten)
        work = Pipeline(held, resolved, force, resume, smoke)
        _go(work, until, keep_serving=keep_serving)


def train(
    recipe: Path,
    *overrides: Overrides,
    run: Path | None = None,
    dry_run: bool = False,
    resume: bool = False,
    smoke: Smoke = 0,
) -> None:
    """Train a recipe's adapter (`up --until train`).

    Parameters
    ----------
    recipe
        The recipe's TOML file.
    overrides
        Any recipe key: --lora.rank 8 --train.steps 20.
    run
        The run directory (default: runs/NAME, as the recipe names itself).
    dry_run
        Print the resolved recipe, the plan and what would be done, and do nothing.
    resume
        Go on from the last checkpoint of a training that was stopped; the recipe and its data must be the same.
    smoke
        One pass over so many rows (8 steps at least, at most those of the recipe), in a run directory of its own; fail
        unless the loss falls.

    """
    up(recipe, *overrides, until="train", run=run, dry_run=dry_run, resume=resume, smoke=smoke)


def merge(run: Path, *, force: bool = False) -> None:
    """Merge a run's trained adapter into one bf16 checkpoint and measure its parity.

    Parameters
    ----------
    run
        The run directory.
    force
        Keep a merged checkpoint that failed parity; the failure is recorded in its evidence.

    """
    held = RunDir(run.resolve())
    done = held.state().stages.get("train")
    if done is None:
        raise ArtifactError(f"{run} has no trained adapter", hint="tuneship train RECIPE")
    with locked(held):
        work = Pipeline(held, recipe_file.load(held.recipe), force)
        adapter = open_artifact(held.path / done.output, kind="adapter")
        print(work.merge(identify(work.fetch()), adapter).path)


def plan(recipe: Path, *overrides: Overrides) -> None:
    """Read the recipe and all of its rows, and say what training and serving would do on this machine.

    Parameters
    ----------
    recipe
        The recipe's TOML file.
    overrides
        Any recipe key: --lora.rank 8 --train.steps 20.

    """
    dry.show_plan(recipe_file.load(recipe, dotted.parse(overrides)))


def _go(work: Pipeline, until: Until, *, keep_serving: bool) -> None:
    source = work.fetch()
    if serves(work.recipe, until):
        work = settle(work, source)
    base = identify(source)
    adapter = work.train(source, base)
    if until == "train":
        print(adapter.path)
        return
    merged_mode = work.recipe.serve.mode == "merged"
    served = work.merge(base, adapter) if merged_mode else adapter
    if until == "merge":
        print(served.path)
        return
    if merged_mode:
        target = Target(served.path, work.recipe.name)
    else:
        target = Target(source.path, source.name, adapters=served.path)
    if until == "serve":
        with work.serve(target) as server:
            server.result()
        return
    if work.bench_is_done(base, served) and not keep_serving:
        say("bench: unchanged")
        _close(work, target, adapter)
        return
    baseline = None
    if merged_mode and work.needs_baseline(base, served):
        with work.serve(Target(source.path, source.name), port=0):
            baseline = work.baseline(base, source.name, served)
    with work.serve(target) as server:
        baseline = baseline or work.baseline(base, source.name, served)
        work.bench(base, served, baseline)
        if keep_serving:
            _close(work, target, adapter)
            say("serving until Ctrl-C")
            server.result()
            return
    _close(work, target, adapter)  # no server's address any more, but the command that starts one


def _close(work: Pipeline, target: Target, adapter: Artifact) -> None:
    """What a run ends with: what was measured, where everything lies, how to talk to it, and the recipe's gate."""
    summary.show(read_report(work.run.report), work.run.path)
    closing.show(work.run, target, adapter)
    gate = work.recipe.bench.gate
    if gate.baseline:
        from tuneship.bench.compare.commands import compare  # noqa: PLC0415 - loads numpy

        compare(
            gate.baseline,
            str(work.run.report),
            latency_margin=gate.latency_margin,
            quality_margin=gate.quality_margin,
            nll_margin=gate.nll_margin,
            alpha=gate.alpha,
        )
