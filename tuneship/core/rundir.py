"""A run's directory: where artifacts, logs and the report of one recipe lie, and what is done already.

runs/<name>/
  recipe.resolved.toml  command.txt  lock  state.json
  artifacts/<kind>-<id12>/
  stages/<stage>/attempt-<n>/{log, metrics.jsonl, heldout.jsonl}      stages/<stage>/latest -> attempt-<n>
  report.json  report.html
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field

from tuneship.core import versioned
from tuneship.core.errors import ArtifactError
from tuneship.core.files import write_atomic

SCHEMA = 1
HELDOUT_FILE = "heldout.jsonl"
"""In an attempt of `train`: the conversations held out, as messages, whatever they are written in."""


class StageState(BaseModel):
    """A stage that finished: what went in, what came out (a path relative to the run), which attempt."""

    model_config = ConfigDict(frozen=True)

    input_id: str
    output: str
    attempt: int
    finished_at: str


class RunState(BaseModel):
    """`state.json`."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    schema_: int = Field(default=SCHEMA, alias="schema")
    stages: dict[str, StageState] = {}


class RunDir(NamedTuple):
    """Paths of one run."""

    path: Path

    @property
    def artifacts(self) -> Path:
        """Where artifacts are sealed."""
        return self.path / "artifacts"

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.resolved.toml"

    @property
    def report(self) -> Path:
        """The run's measurements; `report.html` lies beside it."""
        return self.path / "report.json"

    @property
    def endpoint(self) -> Path:
        """The running server, while it runs."""
        return self.path / "endpoint.json"

    def latest(self, stage: str) -> Path:
        """The newest attempt's directory of `stage` (it may not exist)."""
        return self.path / "stages" / stage / "latest"

    def state(self) -> RunState:
        """What is done already; empty before the first stage."""
        file = self.path / "state.json"
        if not file.exists():
            return RunState()
        return versioned.parse(RunState, file.read_bytes(), file, SCHEMA, ArtifactError)

    def output(self, stage: str, input_id: str) -> Path | None:
        """What `stage` made from exactly these inputs, if it did and it is still there."""
        done = self.state().stages.get(stage)
        if done is None or done.input_id != input_id:
            return None
        path = self.path / done.output
        return path if path.exists() else None

    def finish(self, stage: str, input_id: str, output: Path, attempt: Path) -> None:
        """Record that `stage` made `output`."""
        done = StageState(
            input_id=input_id,
            output=output.relative_to(self.path).as_posix(),
            attempt=int(attempt.name.removeprefix("attempt-")),
            finished_at=_now(),
        )
        state = self.state()
        new = state.model_copy(update={"stages": {**state.stages, stage: done}})
        write_atomic(self.path / "state.json", new.model_dump_json(indent=1, by_alias=True))

    def forget(self, stages: Iterable[str]) -> None:
        """Let `stages` count as not done; what they made stays on disk."""
        state = self.state()
        kept = {name: done for name, done in state.stages.items() if name not in set(stages)}
        if kept != state.stages:
            new = state.model_copy(update={"stages": kept})
            write_atomic(self.path / "state.json", new.model_dump_json(indent=1, by_alias=True))

    def new_attempt(self, stage: str) -> Path:
        """A fresh `attempt-<n>` directory, with `latest` pointing at it."""
        folder = self.path / "stages" / stage
        folder.mkdir(parents=True, exist_ok=True)
        number = 1 + max((int(p.name.removeprefix("attempt-")) for p in folder.glob("attempt-*")), default=0)
        attempt = folder / f"attempt-{number}"
        attempt.mkdir()
        pointer = folder / ".latest"
        pointer.unlink(missing_ok=True)
        pointer.symlink_to(attempt.name)
        pointer.replace(folder / "latest")
        return attempt


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def made(path: Path, *stages: str) -> Path:
    """What the run at `path` made last in any of `stages`; without such a thing, `path`.

    A merge is not what was made last when training went on after it.
    """
    state = RunDir(path).state().stages
    done = [state[stage] for stage in stages if stage in state and (path / state[stage].output).exists()]
    return path / max(done, key=lambda stage: stage.finished_at).output if done else path


@contextmanager
def locked(run: RunDir) -> Iterator[RunDir]:
    """Hold the run alone: creates its directory, removes what a killed attempt left half-written.

    Raises:
        ArtifactError: another process holds it.

    """
    run.path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run.path / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ArtifactError(
            f"{run.path} is in use by another tuneship", hint="wait for it, or choose another --run directory"
        ) from None
    try:
        for leftover in run.artifacts.glob(".draft-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield run
    finally:
        lock.release()
