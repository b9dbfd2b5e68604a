"""Run directories: one holder at a time, what is done is known by its input id, attempts are kept."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tuneship.core import rundir
from tuneship.core.errors import ArtifactError
from tuneship.core.rundir import RunDir, locked, made

HOLD = (
    "import sys, time; from pathlib import Path; from tuneship.core.rundir import RunDir, locked\n"
    "with locked(RunDir(Path(sys.argv[1]))): print('held', flush=True); time.sleep(60)"
)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


@contextmanager
def another_holder(run: RunDir) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        try:
            yield child
        finally:
            child.kill()


def test_a_run_that_another_process_holds_is_refused(run: RunDir):
    with another_holder(run), pytest.raises(ArtifactError, match="is in use by another tuneship"), locked(run):
        pass


def test_a_holder_killed_by_force_holds_nothing(run: RunDir):
    with another_holder(run) as child:
        child.send_signal(signal.SIGKILL)
        child.wait()
        with locked(run):
            pass


def test_it_can_be_held_again_after_an_error(run: RunDir):
    with pytest.raises(ValueError, match="work"), locked(run):
        raise ValueError("work")
    with locked(run):
        pass


def test_stale_drafts_are_removed_and_artifacts_stay(run: RunDir):
    (run.artifacts / ".draft-abc" / "inner").mkdir(parents=True)
    (run.artifacts / "adapter-0123").mkdir()
    with locked(run):
        assert [path.name for path in run.artifacts.iterdir()] == ["adapter-0123"]


def test_attempts_are_numbered_and_the_latest_is_pointed_at(run: RunDir):
    first, second = run.new_attempt("train"), run.new_attempt("train")
    assert [first.name, second.name] == ["attempt-1", "attempt-2"]
    assert run.latest("train").resolve() == second
    assert run.new_attempt("merge").name == "attempt-1"
    first.rmdir()
    assert run.new_attempt("train").name == "attempt-3"


def test_a_stage_is_done_only_for_the_same_input_and_while_its_output_is_there(run: RunDir):
    attempt = run.new_attempt("train")
    output = run.artifacts / "adapter-0123"
    output.mkdir(parents=True)
    assert run.output("train", "id-1") is None
    run.finish("train", "id-1", output, attempt)
    assert run.output("train", "id-1") == output
    assert run.output("train", "id-2") is None
    assert run.output("merge", "id-1") is None
    output.rmdir()
    assert run.output("train", "id-1") is None


def test_a_later_stage_keeps_what_is_known_of_the_earlier(run: RunDir):
    for stage in ("train", "merge"):
        output = run.artifacts / stage
        output.mkdir(parents=True)
        run.finish(stage, f"{stage}-id", output, run.new_attempt(stage))
    assert set(run.state().stages) == {"train", "merge"}
    assert run.state().stages["merge"].output == "artifacts/merge"
    assert run.state().stages["merge"].attempt == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"schema": 2, "stages": []}', "schema 2; this tuneship reads up to 1"),
        ('{"schema": 1', "cannot be read"),
        ('{"stages": {"train": {}}}', "cannot be read: stages.train.input_id"),
        ("[]", "cannot be read"),
    ],
)
def test_a_state_that_cannot_be_read_is_refused(run: RunDir, text: str, says: str):
    run.path.mkdir()
    (run.path / "state.json").write_text(text)
    with pytest.raises(ArtifactError, match=says):
        run.state()


def test_a_forgotten_stage_is_not_done_and_the_others_are(tmp_path: Path):
    run = RunDir(tmp_path)
    for stage in ("train", "merge", "bench"):
        attempt = run.new_attempt(stage)
        run.finish(stage, "id", attempt, attempt)
    run.forget(("merge", "baseline", "bench"))
    assert run.output("train", "id") is not None
    assert run.output("merge", "id") is None
    assert run.output("bench", "id") is None
    assert run.latest("merge").exists(), "what it made stays"


def test_a_runs_folder_stands_for_what_it_made_last(run: RunDir, monkeypatch: pytest.MonkeyPatch):
    attempt = run.path / "stages" / "train" / "attempt-1"
    adapter, merged, again = (run.artifacts / name for name in ("adapter-0123", "merged-4567", "adapter-89ab"))
    for output in (adapter, merged, again):
        output.mkdir(parents=True)
    assert made(run.path, "merge", "train") == run.path
    run.finish("train", "id-1", adapter, attempt)
    assert made(run.path, "merge", "train") == adapter
    run.finish("merge", "id-2", merged, attempt)
    assert made(run.path, "merge", "train") == merged
    assert made(run.path, "train") == adapter
    monkeypatch.setattr(rundir, "_now", lambda: "2999-01-01T00:00:00+00:00")
    run.finish("train", "id-3", again, attempt)
    assert made(run.path, "merge", "train") == again, "that merge is of another training"
    again.rmdir()
    merged.rmdir()
    assert made(run.path, "merge", "train") == run.path
    assert made(adapter, "train") == adapter
