"""SGLang as a child process: start it, wait until it really answers, notice its death, end it with all its children.

It is started from the main thread and ends with us whatever happens: on a clean stop it gets SIGTERM and time to
finish, and if we are killed the kernel ends it, and its workers after it (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from signal import SIGKILL

import psutil

from tuneship.core.errors import EngineError
from tuneship.core.process import descendants, describe_exit, spawn, stop_tree
from tuneship.core.quoting import on_one_line
from tuneship.serve import engine_log, scratch
from tuneship.serve.launch import LOOPBACK, EngineConfig, environment, flags

_POLL_S = 0.1
_PORTS, _TRIES = range(10_000, 20_000), 50
"""Below those that Linux gives to outgoing connections (from 32,768 on)."""
_COUNTERS = "counters"
"""What its processes count while they run (prometheus_client's multiprocess mode)."""
_LOADS = "/dev/shm/sglang_loads_"  # noqa: S108 - its name, not ours
"""A file in memory, of a random name, in which its scheduler tells how busy it is. SGLang never removes it."""
_WORKER = "sglang::"
"""How SGLang's scheduler and detokenizer call themselves; other children of its come and go."""


class Engine:
    """A running SGLang. Made by `start`."""

    def __init__(self, process: subprocess.Popen[bytes], config: EngineConfig, log: Path) -> None:
        self.config = config
        self.log = log
        self.process = process
        self._counters = scratch.folder(log, _COUNTERS)
        self._workers: dict[psutil.Process, str] = {}
        self._loads: set[Path] = set()

    @property
    def url(self) -> str:
        """Where it listens; only the door goes there."""
        return f"http://{self.config.host}:{self.config.port}"

    @property
    def death(self) -> str:
        """Why it no longer serves, in a few words; empty while it does."""
        code = self.process.poll()
        if code is not None:
            return f"it ended with {describe_exit(code)}"
        return next((f"its {name} died" for worker, name in self._workers.items() if not _is_alive(worker)), "")

    def failure(self, what: str) -> EngineError:
        """`what` happened as an error, with the reason from the log."""
        code = self.process.poll()
        reason = engine_log.reason(self.log, main_was_killed=code is not None and code < 0) or self.death
        return EngineError(f"SGLang {what}{': ' if reason else ''}{reason}", hint=f"the whole log: {self.log}")

    def wait_ready(self, selectors: Sequence[str | None], timeout_s: float) -> None:
        """Return once every one of `selectors` (adapters by engine name, None for the base) has generated a token.

        Raises:
            EngineError: it ended, refused a model, or was not ready after `timeout_s`.

        """
        deadline = time.monotonic() + timeout_s
        waiting = list(selectors)
        while waiting:
            if self.death:
                raise self.failure("did not start")
            if time.monotonic() > deadline:
                raise self.failure(f"did not answer within {timeout_s:g} s")
            if self._generates(waiting[0], timeout_s=deadline - time.monotonic()):
                waiting.pop(0)
            else:
                time.sleep(_POLL_S)
        self._loads |= _open_loads(self.process.pid)  # now: who is killed later can no longer be asked
        named = {child: _name(child) for child in descendants(self.process.pid)}
        self._workers = {child: name.removeprefix(_WORKER) for child, name in named.items() if name.startswith(_WORKER)}

    def stop(self) -> None:
        """End its whole tree at once: nobody waits for it any more, and SGLang looks every 5 s whether it shall end."""
        self._loads |= _open_loads(self.process.pid)
        stop_tree(self.process, grace_s=0)
        shutil.rmtree(self._counters, ignore_errors=True)
        for file in self._loads:
            file.unlink(missing_ok=True)

    def _generates(self, selector: str | None, timeout_s: float) -> bool:
        """Whether one token came back; False while nobody listens.

        Raises:
            EngineError: it listens and refuses.

        """
        body = {"text": "a", "sampling_params": {"max_new_tokens": 1, "temperature": 0}, "lora_path": selector}
        connection = http.client.HTTPConnection(self.config.host, self.config.port, timeout=timeout_s)
        try:
            connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = response.read()
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
        if response.status in {200, 503}:
            return response.status == 200
        said = on_one_line(answer.decode(errors="replace")[:300])
        raise EngineError(f"SGLang cannot serve {selector or 'the base'}: {said}", hint=f"the whole log: {self.log}")


def start(config: EngineConfig, log: Path) -> Engine:
    """Start SGLang with `config`, its output going to `log`. It is not ready yet, and the caller must `stop` it.

    Raises:
        EngineError: SGLang is not installed.

    """
    if importlib.util.find_spec("sglang") is None:
        raise EngineError("SGLang is not installed", hint="pip install 'tuneship[serve]'")
    counters = scratch.fresh(log, _COUNTERS)
    argv = [sys.executable, "-m", "sglang.launch_server", *flags(config)]
    with log.open("wb") as output:
        # SIGKILL, not SIGTERM: when we were killed there is nobody left to drain for.
        process = spawn(argv, env=environment(config, os.environ, counters), stdout=output, on_parent_death=SIGKILL)
    return Engine(process, config, log)


def free_port() -> int:
    """A port on loopback that is free now, and likely to be when an engine has started.

    SGLang binds it half a minute later, or minutes. From the range that the system gives to outgoing connections it may
    be gone by then.
    """
    for port in random.SystemRandom().sample(_PORTS, _TRIES):  # whoever seeds the other one would get the same
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((LOOPBACK, port))
            return port
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _open_loads(pid: int) -> set[Path]:
    """The files of that kind which a process below `pid` holds open: whatever the name, those are its own."""
    found = set()
    for process in descendants(pid):
        with contextlib.suppress(psutil.Error):
            found |= {Path(file.path) for file in process.open_files() if file.path.startswith(_LOADS)}
    return found


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()).strip()
    except psutil.Error:
        return ""
