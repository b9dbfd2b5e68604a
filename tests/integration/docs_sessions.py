"""Sessions of processes that end with whoever opened them, however that one ends; the standard library alone.

    sessions = Sessions()
    process = sessions.open("exec sleep 60", cwd=..., stdout=..., env=...)    # bash's
    sessions.close()                                                          # ends what is left

A watcher, this file as a program, holds the other end of a pipe. It reads which sessions there are, and ends them when
nobody can write any more: after `close`, and after a SIGKILL of whoever opened them. The kernel's signal at a parent's
death would not do: it comes when the thread ends that started the child.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO

_LOOKS_S = 0.1


class Sessions:
    """What one walk has started. Threads may share it, and one may close it while another waits for a process."""

    def __init__(self) -> None:
        reads, self._pipe = os.pipe()
        self._watcher = subprocess.Popen([sys.executable, __file__], stdin=reads, start_new_session=True)
        os.close(reads)
        self._lock = threading.Lock()
        self._opened: list[subprocess.Popen[bytes]] = []
        self.closed = False

    def open(self, script: str, *, cwd: Path, stdout: IO[bytes], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start bash in a session of its own; before anything else it names that to the watcher.

        Raises:
            RuntimeError: this was closed.

        """
        with self._lock:
            if self.closed:
                raise RuntimeError("the sessions were closed")
            named = f"echo $$ >&{self._pipe}\nexec {self._pipe}>&-\n{script}"
            process = subprocess.Popen(
                ["bash", "-c", named], cwd=cwd, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stdout, env=dict(env),
                start_new_session=True, pass_fds=(self._pipe,),
            )  # fmt: skip
            self._opened.append(process)
        return process

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """End what is left of one. Its number may be another's from now on."""
        end([process.pid])
        process.wait()
        with self._lock:
            if not self.closed:
                self._opened.remove(process)
                os.write(self._pipe, f"-{process.pid}\n".encode())

    def close(self) -> None:
        """End all that is left, and wait for it."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
            os.close(self._pipe)
        self._watcher.wait()
        for process in self._opened:
            process.wait()


def end(sessions: Iterable[int]) -> None:
    """SIGTERM, at which a server ends its engine too, and after a minute SIGKILL."""
    left = set(sessions) & _alive()
    for number, patience_s in ((signal.SIGTERM, 60), (signal.SIGKILL, 10)):
        for session in left:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(session, number)
        deadline = time.monotonic() + patience_s
        while (left := left & _alive()) and time.monotonic() < deadline:
            time.sleep(_LOOKS_S)


def _alive() -> set[int]:
    """The sessions of which a process runs."""
    found = set()
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, _, _, session, *_ = file.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            if state not in "ZX":
                found.add(int(session))
    return found


def _watch() -> None:
    left: set[int] = set()
    for line in sys.stdin:
        number = int(line)
        (left.add if number > 0 else left.discard)(abs(number))
    end(left)


if __name__ == "__main__":
    _watch()
