"""One stage of `up` as a child process: when it ends, its memory (the GPU's too) is free again.

The parent writes `job.json` into a new attempt directory and starts `python -m <module> <attempt>`. The child finds its
function by the stage's name, and leaves `result.json`, or `error.json` when it failed in an expected way.
"""

from __future__ import annotations

import contextlib
import io
import json
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Self

from pydantic import BaseModel, ConfigDict

from tuneship.core import errors, extras, progress, recipe_file
from tuneship.core.errors import ExitCode, StageError, TuneshipError
from tuneship.core.files import write_atomic
from tuneship.core.process import describe_exit, spawn, stop_tree
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


class StageProcess:
    """A stage that runs. Leave the `with` block and its whole process tree is gone.

    with StageProcess(job, "tuneship.train") as stage:
        output = stage.result()
    """

    def __init__(self, job: Job, module: str, grace_s: float = GRACE_S) -> None:
        self.job = job
        self._grace_s = grace_s
        self._module = module
        self._log = job.attempt / "log"
        self._last_line = ""

    def __enter__(self) -> Self:
        extras.require_of(self._module)
        write_atomic(self.job.attempt / "job.json", self.job.model_dump_json(indent=1))
        argv = [sys.executable, "-m", self._module, str(self.job.attempt)]
        self._process = spawn(argv, stdout=subprocess.PIPE, env={"PYTHONUNBUFFERED": "1"})
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind in {SystemExit, KeyboardInterrupt} and self._process.poll() is None:  # a step can take long
            progress.say(f"stopping {self.job.stage}: {self._grace_s:g} s at most")
        self._close()
        if kind in {SystemExit, KeyboardInterrupt} and self._process.returncode == ExitCode.RESUMABLE:
            stopped = self._error(ExitCode.RESUMABLE)
            if kind is SystemExit:
                raise stopped from None
            progress.say(f"{stopped.message}; {stopped.hint}")

    def result(self) -> Path:
        """Wait for the stage to end and return what it made.

        Raises:
            TuneshipError: the stage's own error, of its own class.
            StageError: it ended without a word (crash, killed).

        """
        code = self._process.wait()
        self._close()
        result = self.job.attempt / "result.json"
        if code == 0 and result.exists():
            return Path(json.loads(result.read_text(encoding="utf-8"))["output"])
        raise self._error(code)

    def wait_for(self, file: Path) -> None:
        """Wait until `file` exists; the stage's error is raised when it ends before."""
        while not file.exists():
            code = self._process.poll()
            if code is not None:
                self._close()
                raise self._error(code)
            time.sleep(0.1)

    def _close(self) -> None:
        """End what still runs; what a stage leaves behind would hold the pipe open too."""
        stop_tree(self._process, self._grace_s)
        self._reader.join(timeout=5)

    def _read(self) -> None:
        """Events to the user, everything else to the log."""
        assert self._process.stdout is not None
        text = io.TextIOWrapper(self._process.stdout, encoding="utf-8", errors="replace")
        with text as lines, self._log.open("wb", buffering=0) as log:
            for line in lines:
                event = progress.parse(line)
                if event:
                    progress.show(event)
                    continue
                self._last_line = line.strip() or self._last_line
                with contextlib.suppress(OSError):  # a full disk must not leave the child with a pipe that nobody reads
                    log.write(line.encode())

    def _error(self, code: int) -> TuneshipError:
        stage = self.job.stage
        try:
            failure = json.loads((self.job.attempt / "error.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            last = self._last_line or "it wrote nothing"
            return StageError(f"the {stage} stage ended with {describe_exit(code)}: {last}", hint=f"see {self._log}")
        return errors.by_name(failure["type"])(failure["message"], failure["hint"])


def run_job(job: Job, module: str, grace_s: float = GRACE_S) -> Path:
    """Run `job` in a process of its own and return what it made (errors as in `StageProcess.result`).

    Told to end, it has `grace_s` to do so. What it keeps by then is said, and raised where we were told by SIGTERM.
    """
    with StageProcess(job, module, grace_s) as stage:
        return stage.result()


def child_main(stages: Mapping[str, StageFunction]) -> None:
    """The whole main program of a stage's process."""
    attempt = Path(sys.argv[1])
    job = Job.model_validate_json((attempt / "job.json").read_text(encoding="utf-8"))
    signal.signal(signal.SIGTERM, _unwind)
    progress.use(progress.ToParent())
    try:
        output = stages[job.stage](job)
        write_atomic(attempt / "result.json", json.dumps({"output": str(output)}))
    except TuneshipError as error:
        _leave_error(attempt, error)
        sys.exit(error.exit_code)
    except Exception as error:  # noqa: BLE001 - the boundary that attributes and records
        traceback.print_exc()
        _leave_error(attempt, StageError(f"{job.stage}: {_summary(error)}", hint=f"see {attempt / 'log'}"))
        sys.exit(ExitCode.FAILED)


def _leave_error(attempt: Path, error: TuneshipError) -> None:
    failure = {"type": type(error).__name__, "message": error.message, "hint": error.hint}
    try:
        write_atomic(attempt / "error.json", json.dumps(failure))
    except OSError:  # the disk is full: the parent reports our last line
        print(error.message, flush=True)


def _unwind(_signal: int, _frame: FrameType | None) -> None:
    """SIGTERM leaves through the context managers, which remove drafts and stop children."""
    sys.exit(128 + signal.SIGTERM)


def _summary(error: Exception) -> str:
    if "No space left on device" in str(error):  # also what safetensors and torch make of ENOSPC
        return "the disk is full"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
