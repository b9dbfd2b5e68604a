"""The preflight in a process of its own, for adapters that arrive while a server runs.

    checker = Checker(source, limits)
    checker.start()                      # warm: it has imported and read the base before the first adapter comes
    checked = await checker.check(path)
    remarks = await checker.sound(checked, copy)     # before anybody asks what has loaded the copy
    await checker.prove(checked, copy)               # before anybody else does

A hostile `adapter_config.json` can hold a pattern that a regular expression never finishes, and a huge file takes long:
neither may stop the door. Whoever takes longer than `CHECK_S` is killed, and the next adapter gets a new process.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from tuneship.core.errors import PreflightError, TuneshipError, by_name
from tuneship.core.model_source import ModelSource
from tuneship.core.process import die_with_parent
from tuneship.core.quoting import quoted
from tuneship.serve import preflight
from tuneship.serve.preflight import CheckedAdapter, Limits

CHECK_S = 120.0


class _Failed(NamedTuple):
    """An error, by its parts: not every exception can be sent."""

    kind: str
    message: str
    hint: str


class _Question(NamedTuple):
    """A function of the preflight, and what it is asked about: a path, or what was checked and its copy."""

    name: str
    about: tuple[Any, ...]
    where: Path


class Checker:
    """One process that answers one question at a time; started from the main thread, like every child of ours."""

    def __init__(self, source: ModelSource, limits: Limits) -> None:
        self._base = (source, limits)
        self._one_at_a_time = asyncio.Lock()
        self._process: Any = None
        self._pipe: Connection

    def start(self) -> None:
        """Have the process there; it needs about a second to get ready."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, *self._base, os.getpid()), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """The process; 0 while there is none."""
        return self._process.pid if self._process else 0

    def stop(self) -> None:
        """End the process."""
        if self._process:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None

    async def check(self, path: Path, timeout_s: float = CHECK_S) -> CheckedAdapter:
        """`preflight.fits` of the adapter at `path`.

        Raises:
            ArtifactError, PreflightError: as that does, or it took longer than `timeout_s`.

        """
        found = await self._ask(_Question("fits", (path,), path), path.name, timeout_s)
        assert isinstance(found, CheckedAdapter)
        return found

    async def sound(self, checked: CheckedAdapter, copy: Path, timeout_s: float = CHECK_S) -> tuple[str, ...]:
        """`preflight.sound` of a copy of what was checked.

        Raises:
            ArtifactError, PreflightError: as `check`.

        """
        found = await self._ask(_Question("sound", (checked, copy), checked.path), checked.name, timeout_s)
        assert isinstance(found, tuple)
        return found

    async def prove(self, checked: CheckedAdapter, copy: Path, timeout_s: float = CHECK_S) -> None:
        """`preflight.prove` of a copy of what was checked.

        Raises:
            ArtifactError, PreflightError: as `check`.

        """
        await self._ask(_Question("prove", (checked, copy), checked.path), checked.name, timeout_s)

    async def _ask(self, question: _Question, name: str, timeout_s: float) -> object:
        async with self._one_at_a_time:
            if self._process is None or not self._process.is_alive():
                self.stop()
                self.start()
            try:
                self._pipe.send(question)
                answered = await self._polled(timeout_s)
            except OSError:
                answered = True  # it ended, which shows below
            if not answered:
                self.stop()
                raise PreflightError(
                    f"adapter {quoted(name)} could not be checked within {timeout_s:g} s",
                    hint="is one of the patterns in its adapter_config.json endless?",
                )
            try:
                found: object = self._pipe.recv()
            except (EOFError, OSError):  # reset, where it ended before it read the question
                self.stop()
                raise PreflightError(f"checking adapter {quoted(name)} ended the process that did it") from None
        if isinstance(found, _Failed):
            raise by_name(found.kind)(found.message, found.hint)
        return found

    async def _polled(self, timeout_s: float) -> bool:
        polling = asyncio.create_task(asyncio.to_thread(self._pipe.poll, timeout_s))
        try:
            return await asyncio.shield(polling)
        except asyncio.CancelledError:
            # Its answer would be taken for that to the next question. Its end wakes the thread that polls, and only
            # then is the pipe closed: else that may go on with the next one's, which gets the same number.
            self._process.kill()
            try:
                await asyncio.gather(polling, return_exceptions=True)
            finally:
                self.stop()
            raise


def _work(pipe: Connection, source: ModelSource, limits: Limits, parent: int) -> None:
    """Check what comes through `pipe` until it is closed."""
    die_with_parent(signal.SIGKILL, parent)()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is our parent's to decide
    base = preflight.read_base(source)
    answers: dict[str, Callable[..., Any]] = {
        "fits": partial(preflight.fits, base=base, limits=limits),
        "sound": partial(preflight.sound, base=base, limits=limits),
        "prove": preflight.prove,
    }
    while True:
        try:
            name, about, where = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(answers[name](*about))
        except TuneshipError as error:
            pipe.send(_Failed(type(error).__name__, error.message, error.hint))
        except OSError as error:
            pipe.send(_Failed("ArtifactError", f"{where} cannot be read: {error.strerror or error}", ""))
