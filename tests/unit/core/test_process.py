"""Children end when we do, with everything below them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tuneship.core import process as processes
from tuneship.core.process import describe_exit, spawn, stop_tree, tail

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
# Starts a grandchild that ignores SIGTERM, says its pid once it is up, and waits.
PARENT = (
    "import subprocess, sys, time\n"
    f"child = subprocess.Popen([sys.executable, '-c', {STUBBORN!r}], stdout=subprocess.PIPE)\n"
    "child.stdout.readline(); print(child.pid, flush=True); time.sleep(60)"
)

Start = Callable[[str], subprocess.Popen[bytes]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Spawn Python code; whatever it leaves is killed after the test."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(code: str) -> subprocess.Popen[bytes]:
        started.append(spawn([sys.executable, "-c", code], stdout=subprocess.PIPE))
        return started[-1]

    yield begin
    for child in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


def first_line(child: subprocess.Popen[bytes]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().decode().strip()


def ends_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


def test_who_ended_is_not_waited_for_until_its_parent_asks(start: Start) -> None:
    """A child of the tree is killed before its parent, which never asks for its status."""
    parent = start(PARENT)
    child = int(first_line(parent))
    began = time.monotonic()
    processes.kill_all({psutil.Process(child)})
    assert psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    assert time.monotonic() - began < processes._END_S / 2


def test_stopping_ends_grandchildren_that_ignore_sigterm(start: Start):
    child = start(PARENT)
    grandchild = int(first_line(child))
    stop_tree(child, grace_s=5)
    assert child.returncode == -signal.SIGTERM
    assert ends_within(grandchild, 2)


def test_stopping_ends_a_child_that_ignores_sigterm_after_its_grace(start: Start):
    child = start(STUBBORN)
    first_line(child)
    begin = time.monotonic()
    stop_tree(child, grace_s=0.5)
    assert child.returncode == -signal.SIGKILL
    assert 0.4 < time.monotonic() - begin < 5


def test_stopping_ends_what_a_killed_child_left_behind(start: Start):
    child = start(PARENT)
    grandchild = int(first_line(child))
    child.kill()
    child.wait()
    assert not ends_within(grandchild, 0.3)
    stop_tree(child, grace_s=5)
    assert ends_within(grandchild, 2)


def test_stopping_what_has_ended_does_nothing(start: Start):
    child = start("print('done', flush=True)")
    child.wait()
    stop_tree(child, grace_s=5)
    assert child.returncode == 0


def test_a_second_interrupt_while_waiting_ends_the_tree_at_once(start: Start):
    child = start(STUBBORN)
    first_line(child)
    before = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            stop_tree(child, grace_s=60)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert child.returncode == -signal.SIGKILL


def test_a_child_dies_with_its_parent(tmp_path: Path):
    code = (
        "import subprocess, sys; from tuneship.core.process import spawn\n"
        "child = spawn([sys.executable, '-c', 'import time; time.sleep(60)'], stdout=subprocess.DEVNULL)\n"
        "print(child.pid, flush=True); child.wait()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=tmp_path) as parent:
        child = int(first_line(parent))
        assert psutil.pid_exists(child)
        parent.kill()
    assert ends_within(child, 5)


def test_a_child_has_a_session_of_its_own_and_our_environment(start: Start, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TUNESHIP_TEST_VALUE", "here")
    child = start("import os; print(os.getsid(0), os.environ['TUNESHIP_TEST_VALUE'], flush=True)")
    assert first_line(child) == f"{child.pid} here"


def test_stderr_is_joined_to_stdout(start: Start):
    assert first_line(start("import sys; print('oops', file=sys.stderr)")) == "oops"


def test_a_vanished_process_has_no_descendants():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert processes.descendants(child.pid) == []


@pytest.mark.parametrize(
    ("code", "words"), [(0, "exit code 0"), (3, "exit code 3"), (-15, "SIGTERM"), (-9, "SIGKILL (the kernel ends")]
)
def test_exits_are_described(code: int, words: str):
    assert describe_exit(code).startswith(words)


def test_the_tail_of_a_log(tmp_path: Path):
    log = tmp_path / "log"
    assert tail(log) == ""
    log.write_bytes(b"\xff broken\n" + b"".join(b"line %d\n" % n for n in range(50_000)))
    assert tail(log, 2) == "line 49998\nline 49999"
    assert len(tail(log).splitlines()) == 20
