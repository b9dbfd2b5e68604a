"""One stage of `up` as a child process: when it ends, its memory (the GPU's too) is free again.

The parent writes `job.json` into a new attempt directory and starts `python -m <module> <attempt>`. The child finds its
function by the stage's name, and leaves `result.json`, or `error.json` when it failed in an expected way.
"""

from __future__ import annotations

import io
import json
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType

from pydantic import BaseModel, ConfigDict

from tuneship.core import errors, progress, recipe_file
from tuneship.core.errors import ExitCode, StageError, TuneshipError
from tuneship.core.files import write_atomic
from tuneship.core.process import describe_exit, spawn, stop_tree, tail
from tuneship.core.recipe import Recipe
from tuneship.core.rundir import RunDir

GRACE_S = 20


class Job(BaseModel):
    """What a stage's process is asked to do. `inputs` are paths by role, such as {"adapter": ".../adapter-3fa9..."}."""

    model_config = ConfigDict(frozen=True)

    stage: str
    input_id: str
    run_path: Path
    attempt: Path
    inputs: dict[str, str] = {}
    force: bool = False

    @property
    def run(self) -> RunDir:
        """The run it belongs to."""
        return RunDir(self.run_path)

    @property
    def recipe(self) -> Recipe:
        """The run's resolved recipe."""
        return recipe_file.load(self.run.recipe)


StageFunction = Callable[[Job], Path]


def run_job(job: Job, module: str) -> Path:
    """Run `job` in a child process and return what it made.

    Raises:
        TuneshipError: the child's own error, of its own class.
        StageError: the child ended without a word (crash, killed).

    """
    write_atomic(job.attempt / "job.json", job.model_dump_json(indent=1))
    log = job.attempt / "log"
    process = spawn([sys.executable, "-m", module, str(job.attempt)], stdout=-1, env={"PYTHONUNBUFFERED": "1"})
    assert process.stdout is not None
    try:
        with log.open("w", encoding="utf-8") as file:
            for line in io.TextIOWrapper(process.stdout, encoding="utf-8", errors="replace", newline=None):
                event = progress.parse(line)
                if event:
                    progress.show(event)
                else:
                    file.write(line)
                    file.flush()
        code = process.wait()
    finally:
        stop_tree(process, GRACE_S)
    result = job.attempt / "result.json"
    if code == 0 and result.exists():
        return Path(json.loads(result.read_text(encoding="utf-8"))["output"])
    raise _child_error(job, code, log)


def child_main(stages: Mapping[str, StageFunction]) -> None:
    """The whole main program of a stage's process."""
    attempt = Path(sys.argv[1])
    job = Job.model_validate_json((attempt / "job.json").read_text(encoding="utf-8"))
    signal.signal(signal.SIGTERM, _unwind)
    progress.use(progress.ToParent())
    try:
        output = stages[job.stage](job)
    except TuneshipError as error:
        failure = {"type": type(error).__name__, "message": error.message, "hint": error.hint}
        write_atomic(attempt / "error.json", json.dumps(failure))
        sys.exit(error.exit_code)
    except Exception as error:  # noqa: BLE001 - the boundary that attributes and records
        traceback.print_exc()
        failure = {"type": "StageError", "message": f"{job.stage}: {_summary(error)}", "hint": f"see {attempt / 'log'}"}
        write_atomic(attempt / "error.json", json.dumps(failure))
        sys.exit(ExitCode.FAILED)
    write_atomic(attempt / "result.json", json.dumps({"output": str(output)}))


def _unwind(_signal: int, _frame: FrameType | None) -> None:
    """SIGTERM leaves through the context managers, which remove drafts and stop children."""
    sys.exit(128 + signal.SIGTERM)


def _summary(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == 28:
        return "the disk is full"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _child_error(job: Job, code: int, log: Path) -> TuneshipError:
    try:
        failure = json.loads((job.attempt / "error.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        last = tail(log, 1) or "it wrote nothing"
        return StageError(f"the {job.stage} stage ended with {describe_exit(code)}: {last}", hint=f"see {log}")
    return errors.by_name(failure["type"])(failure["message"], failure["hint"])
