"""A stage in its own process: its errors arrive as they were raised, and none of it outlives its parent."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tuneship.core import errors, progress
from tuneship.core.errors import ArtifactError, Checkpointed, StageError, TrainError
from tuneship.core.progress import Event
from tuneship.core.rundir import RunDir
from tuneship.core.stage import Job, StageProcess, run_job

# What `python -m fake_stage <attempt>` runs: stages that go wrong in every way.
MODULE = """
import os, signal, subprocess, sys, time
from contextlib import contextmanager
from pathlib import Path
from tuneship.core.errors import Checkpointed, TrainError
from tuneship.core.progress import progress, say
from tuneship.core.stage import child_main

def works(job):
    print("to the log")
    say("loading"); progress("train", 3, 4, "loss 0.5")
    (job.attempt / "out").write_text(job.inputs["word"])
    return job.attempt / "out"

def known(job): raise TrainError("the loss is NaN", hint="lower train.learning_rate")
def unknown(job): raise ZeroDivisionError("by zero\\nsecond line")
def killed(job): print("about to go", flush=True); os.kill(os.getpid(), signal.SIGKILL)
def silent(job): sys.exit(0)
def full(job): raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
def chatty(job):
    for n in range(8000): print("x" * 200)
    raise TrainError("after much talk")

def keeps(job):
    signal.signal(signal.SIGTERM, lambda *_: (job.attempt / "told").touch())
    (job.attempt / "ready").touch()
    while not (job.attempt / "told").exists(): time.sleep(0.01)
    raise Checkpointed("kept after step 3", hint="--resume")

@contextmanager
def marked(path):
    path.touch()
    try: yield
    finally: path.unlink()

def waits(job):
    with marked(job.attempt / "inside"):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        (job.attempt / "pid").write_text(str(child.pid))
        (job.attempt / "ready").touch()
        time.sleep(60)

if __name__ == "__main__":
    child_main({f.__name__: f for f in (works, known, unknown, killed, silent, full, chatty, waits, keeps)})
"""

MakeJob = Callable[..., Job]


class Heard:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def show(self, event: Event) -> None:
        self.events.append(event)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeJob:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "fake_stage.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    run = RunDir(tmp_path / "run")

    def make(stage: str, attempt: Path | None = None) -> Job:
        folder = attempt or run.new_attempt(stage)
        return Job(stage=stage, input_id="0", run_path=run.path, attempt=folder, inputs={"word": "seven"})

    return make


def log_of(job: Job) -> str:
    return (job.attempt / "log").read_text()


def test_what_it_made_comes_back_and_its_words_go_where_they_belong(job: MakeJob):
    heard = Heard()
    progress.use(heard)
    work = job("works")
    output = run_job(work, "fake_stage")
    assert output.read_text() == "seven"
    assert heard.events == [Event("loading"), Event("train", 3, 4, "loss 0.5")]
    assert log_of(work) == "to the log\n"


def test_an_expected_error_comes_back_as_its_own_class_with_its_hint(job: MakeJob):
    with pytest.raises(TrainError) as caught:
        run_job(job("known"), "fake_stage")
    assert caught.value.message == "the loss is NaN"
    assert caught.value.hint == "lower train.learning_rate"


def test_an_unexpected_error_names_the_stage_and_leaves_its_traceback(job: MakeJob):
    work = job("unknown")
    with pytest.raises(StageError) as caught:
        run_job(work, "fake_stage")
    assert caught.value.message == "unknown: ZeroDivisionError: by zero"
    assert str(work.attempt / "log") in caught.value.hint
    assert "Traceback (most recent call last)" in log_of(work)


def test_a_killed_stage_is_named_with_the_signal_and_its_last_words(job: MakeJob):
    with pytest.raises(StageError, match=r"the killed stage ended with SIGKILL .*: about to go"):
        run_job(job("killed"), "fake_stage")


def test_a_stage_that_ends_well_without_a_result_is_an_error(job: MakeJob):
    with pytest.raises(StageError, match="ended with exit code 0: it wrote nothing"):
        run_job(job("silent"), "fake_stage")


def test_a_library_that_hits_a_full_disk_is_understood(job: MakeJob):
    with pytest.raises(StageError, match="full: the disk is full"):
        run_job(job("full"), "fake_stage")


def test_a_log_on_a_full_disk_does_not_block_the_stage(job: MakeJob, small_disk: Path):
    with pytest.raises(StageError, match="ended with exit code 1: after much talk"):
        run_job(job("chatty", small_disk), "fake_stage")


def test_leaving_the_block_unwinds_the_stage_and_ends_its_children(job: MakeJob):
    work = job("waits")
    with StageProcess(work, "fake_stage") as stage:
        stage.wait_for(work.attempt / "ready")
        grandchild = psutil.Process(int((work.attempt / "pid").read_text()))
        assert (work.attempt / "inside").exists()
    assert not (work.attempt / "inside").exists()
    grandchild.wait(5)


def children(*, recursive: bool = False) -> list[psutil.Process]:
    """Ours, without multiprocessing's own, which another test may have started and which ends with this process."""
    found = psutil.Process().children(recursive=recursive)
    return [child for child in found if "resource_tracker" not in " ".join(child.cmdline())]


def test_sigterm_to_the_stage_unwinds_its_context_managers(job: MakeJob):
    work = job("waits")
    with StageProcess(work, "fake_stage") as stage:
        stage.wait_for(work.attempt / "ready")
        (child,) = children()
        child.send_signal(signal.SIGTERM)
        with pytest.raises(StageError, match="the waits stage ended with exit code 143"):
            stage.result()
    assert not (work.attempt / "inside").exists()


def test_waiting_for_a_file_ends_with_the_stage(job: MakeJob):
    work = job("known")
    with StageProcess(work, "fake_stage") as stage, pytest.raises(TrainError):
        stage.wait_for(work.attempt / "never")


def test_ctrl_c_while_waiting_leaves_no_process(job: MakeJob):
    work = job("waits")

    def interrupt_when_ready() -> None:
        while not (work.attempt / "ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt_when_ready).start()
    with pytest.raises(KeyboardInterrupt):
        run_job(work, "fake_stage")
    assert not children(recursive=True)
    assert not (work.attempt / "inside").exists()


@pytest.mark.parametrize(("asked", "raised"), [(SystemExit, Checkpointed), (KeyboardInterrupt, KeyboardInterrupt)])
def test_what_a_stage_keeps_when_it_is_told_to_end_is_said(job: MakeJob, capsys, asked, raised):
    def stop(work: Job) -> None:
        with StageProcess(work, "fake_stage") as stage:
            stage.wait_for(work.attempt / "ready")
            raise asked

    with pytest.raises(raised) as ended:
        stop(job("keeps"))
    first, *then = capsys.readouterr().err.splitlines()
    assert first == "stopping keeps: 20 s at most"
    said = then if raised is KeyboardInterrupt else [f"{ended.value.message}; {ended.value.hint}"]
    assert said == ["kept after step 3; --resume"]


def test_every_error_class_is_found_by_its_name():
    assert errors.by_name("ArtifactError") is ArtifactError
    assert errors.by_name("NotOfOurs") is errors.TuneshipError
    assert all(errors.by_name(cls.__name__) is cls for cls in errors.TuneshipError.__subclasses__())
