"""Child processes that end when we do: started in a session of their own, stopped as a whole tree."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

from tuneship.core.hardware import thread_settings

_PR_SET_PDEATHSIG = 1
_END_S, _POLL_S = 5.0, 0.02
_libc = ctypes.CDLL(None, use_errno=True)


def spawn(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    stdout: int | IO[bytes] | None = None,
    cwd: Path | None = None,
    on_parent_death: signal.Signals = signal.SIGTERM,
) -> subprocess.Popen[bytes]:
    """Start `argv` with stderr joined to `stdout`, in its own session, so that a terminal's Ctrl-C reaches only us.

    The kernel sends it `on_parent_death` when the thread that called this ends: call it from the main thread.
    """
    return subprocess.Popen(
        argv,
        env={**thread_settings(), **os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.STDOUT,
        cwd=cwd,
        start_new_session=True,
        preexec_fn=die_with_parent(on_parent_death, os.getpid()),  # noqa: PLW1509 - runs two system calls, no locks
    )


def stop_tree(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """Send SIGTERM to `process`, give it `grace_s` seconds, then end whatever is left of its tree.

    A second Ctrl-C while waiting ends the tree at once.
    """
    family = _tree(process)
    try:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace_s)
    finally:
        kill_all(family | _tree(process))
        if process.poll() is None:
            process.kill()
        process.wait()


def descendants(pid: int) -> list[psutil.Process]:
    """The processes below `pid`; empty when it is gone."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _tree(process: subprocess.Popen[bytes]) -> set[psutil.Process]:
    """Its descendants, and its session: what a killed process leaves behind has another parent but the same session.

    Without itself: psutil would collect its exit status before `Popen` sees it.
    """
    same_session = (p for p in psutil.process_iter() if _session(p) == process.pid and p.pid != process.pid)
    return {*descendants(process.pid), *same_session}


def _session(process: psutil.Process) -> int:
    try:
        return os.getsid(process.pid)
    except OSError:
        return -1


def kill_all(processes: set[psutil.Process]) -> None:
    """SIGKILL every one that still runs (psutil compares start times, so a reused pid is safe), and see them end."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    until = time.monotonic() + _END_S
    while any(map(_runs, processes)) and time.monotonic() < until:
        time.sleep(_POLL_S)


def _runs(process: psutil.Process) -> bool:
    """One that has ended holds nothing any more, also where its parent has not asked yet how it ended."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def describe_exit(returncode: int) -> str:
    """`exit code 1`, or the signal's name with what usually sends it."""
    if returncode >= 0:
        return f"exit code {returncode}"
    name = signal.Signals(-returncode).name
    return f"{name} (the kernel ends processes so when memory runs out)" if name == "SIGKILL" else name


def tail(path: Path, lines: int = 20) -> str:
    """The last lines of a log; empty when there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 64 * 1024))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


def die_with_parent(sig: signal.Signals, parent: int) -> Callable[[], None]:
    """What a child of `parent` calls so that the kernel sends it `sig` when that ends, or has ended already."""

    def in_child() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, sig)
        if os.getppid() != parent:  # the parent died before the call above
            os.kill(os.getpid(), sig)

    return in_child
