"""Run every command of the pages for real, in order, in one folder; print a line for each.

    python tests/integration/docs_walk.py                       # all pages, with this checkout's recipes
    python tests/integration/docs_walk.py --tuneship "python3 -m tuneship" --gpu docs/jobs/train.md

What cannot run on any machine but a reader's own is named in `docs_not_run.NOT_RUN`, with the reason; it is skipped, in
print. Ends with 1 when a command ended otherwise, took too long, or did not say what its page shows. Nothing is
written outside --work but what tuneship keeps in its cache; no process is left behind, however this one ends.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).parent))
from docs_not_run import NEEDS_GPU, NOT_RUN
from docs_pages import ROOT, WALKED, Step, steps
from docs_sessions import Sessions

PORT = 30000
"""Of the pages."""
_STARTS_S = 0.2
_PORT_FREE_S = 10


class Outcome(NamedTuple):
    """How a step ended. `problem` is empty where it did as its page says."""

    step: Step
    seconds: float
    code: int | None
    problem: str
    printed: str = ""


@dataclass
class Walk:
    """A folder and the terminals in it. Every command is bash's; what one sets, the next one finds.

    Another `reader` in the same folder has variables and terminals of its own. The pages' port becomes `port`.
    """

    folder: Path
    environment: Mapping[str, str]
    limit_s: float = 600
    reader: str = "reader"
    port: int = PORT
    _running: list[tuple[subprocess.Popen[bytes], Path]] = field(default_factory=list)
    _sessions: Sessions = field(default_factory=Sessions)

    def follow(self, pages: Sequence[Path], *, gpu: bool = False) -> Iterator[Outcome]:
        """Every step of `pages` that can run here, as it ends; pages that build on each other in their order.

        After `close`, which another thread may call, no further step begins.
        """
        left = {**NOT_RUN, **({} if gpu else NEEDS_GPU)}
        for step in [step for page in sorted(pages, key=_place) for step in steps(page)]:
            if why := left.get(step.command):
                yield Outcome(step, 0.0, None, "", f"not run: {why}")
                continue
            outcome = self.do(step.at(PORT, self.port))
            if self._sessions.closed:
                return
            yield outcome

    def do(self, step: Step) -> Outcome:
        """One step."""
        began = time.monotonic()
        if step.kind == "interrupt":
            code, problem, printed = self._interrupt()
        elif step.kind == "leave running":
            code, problem, printed = self._leave_running(step)
        else:
            code, problem, printed = self._run(step)
        return Outcome(step, time.monotonic() - began, code, problem, printed)

    def close(self) -> None:
        """End what still runs."""
        self._sessions.close()

    def _run(self, step: Step) -> tuple[int | None, str, str]:
        process, log = self._start(f"{step.command}\n", "foreground")
        try:
            code = process.wait(self.limit_s)
        except subprocess.TimeoutExpired:
            return None, f"still running after {self.limit_s:.0f} s", _text(log)
        finally:
            self._sessions.end(process)
        printed = _text(log)
        if code not in step.exits:
            return code, f"exit {code}, not {' or '.join(map(str, step.exits))}", printed
        return code, _unseen(step, printed), printed

    def _leave_running(self, step: Step) -> tuple[int | None, str, str]:
        process, log = self._start(f"exec {step.command}\n", f"terminal-{len(self._running)}-{step.line}")
        self._running.append((process, log))
        deadline = time.monotonic() + self.limit_s
        while step.missing(_text(log)):
            if process.poll() is not None:
                return process.returncode, f"ended with {process.returncode}", _text(log)
            if time.monotonic() > deadline:
                return None, _unseen(step, _text(log)), _text(log)
            time.sleep(_STARTS_S)
        return None, "", _text(log)

    def _interrupt(self) -> tuple[int | None, str, str]:
        """Ctrl-C in the terminal that was opened last."""
        if not self._running:
            return None, "nothing runs", ""
        process, log = self._running.pop()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        try:
            code = process.wait(self.limit_s)
            return code, self._left_behind() if code == 130 else f"exit {code} after Ctrl-C, not 130", _text(log)
        except subprocess.TimeoutExpired:
            return None, f"still running {self.limit_s:.0f} s after Ctrl-C", _text(log)
        finally:
            self._sessions.end(process)

    def _left_behind(self) -> str:
        """Whether somebody has the server's port still, after a short wait."""
        deadline = time.monotonic() + _PORT_FREE_S
        while is_busy(self.port):
            if time.monotonic() > deadline:
                return f"port {self.port} still answers {_PORT_FREE_S} s after Ctrl-C"
            time.sleep(_STARTS_S)
        return ""

    def _start(self, script: str, name: str) -> tuple[subprocess.Popen[bytes], Path]:
        """A terminal: it knows what the ones before it have set."""
        desk = self.folder / ".walk" / self.reader
        state, log = desk / "variables", desk / f"{name}.log"
        desk.mkdir(parents=True, exist_ok=True)
        state.touch()
        text = f". {state}\nset -a -o pipefail\n{script}code=$?\nexport -p > {state}\nexit $code\n"
        with log.open("wb") as output:
            process = self._sessions.open(text, cwd=self.folder, stdout=output, env=self.environment)
        return process, log


def _place(page: Path) -> int:
    """A shell's `docs/jobs/*.md` is in another order than a reader's."""
    known = [path.resolve() for path in WALKED]
    return known.index(page.resolve()) if page.resolve() in known else len(known)


def is_busy(port: int) -> bool:
    """Whether somebody of this machine listens there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    """One below those that the kernel hands out, so that nobody gets it between one server of the walk and the next."""
    return next(port for port in random.sample(range(20000, 30000), 100) if not is_busy(port))


def line(outcome: Outcome) -> str:
    """One line a command."""
    step = outcome.step
    code = "-" if outcome.code is None else str(outcome.code)
    verdict = "FAILED" if outcome.problem else "not run" if outcome.printed.startswith("not run") else "as shown"
    command = step.command.partition("\n")[0]
    return f"{verdict:<8} exit {code:>3} {outcome.seconds:7.1f} s  {step.page}:{step.line}  {command}"


def complaint(outcome: Outcome) -> str:
    """What went wrong, and the end of what was printed."""
    return "\n".join([f"    {outcome.problem}", *(f"    | {said}" for said in outcome.printed.splitlines()[-30:])])


def environment(folder: Path, tuneship: str = "", engine_args: str = "", port: int = PORT) -> dict[str, str]:
    """This one's, with `tuneship` in reach, whose servers listen at `port`, and their keys and state in `folder`."""
    tools = folder / ".walk" / "bin"
    tools.mkdir(parents=True, exist_ok=True)
    if tuneship or engine_args or port != PORT:
        file = tools / "tuneship"
        file.write_text(_starter(tuneship or str(Path(sys.executable).with_name("tuneship")), engine_args, port))
        file.chmod(0o755)
    path = os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]])
    not_ours = {name for name in os.environ if name.startswith("TUNESHIP_")} - {"TUNESHIP_CACHE"}
    kept = {name: value for name, value in os.environ.items() if name not in not_ours}
    own = {"TUNESHIP_KEYS": folder / ".walk" / "keys.toml", "TUNESHIP_STATE": folder / ".walk" / "state"}
    return {**kept, **{name: str(path) for name, path in own.items()}, "PATH": path, "COLUMNS": "140"}


def _starter(tuneship: str, engine_args: str, port: int) -> str:
    """A `tuneship` that is started in another way, and hands flags of its own to SGLang."""
    words = shlex.split(engine_args)
    serve = [f"--extra-arg={word}" for word in words]
    up = ["--serve.extra_args", json.dumps(words)] if words else []
    if port != PORT:
        serve += ["--port", str(port)]
        up += ["--serve.port", str(port)]
    return (
        f'#!/bin/sh\ncase "$1" in\nserve) exec {tuneship} "$@" {shlex.join(serve)} ;;\n'
        f'up) exec {tuneship} "$@" {shlex.join(up)} ;;\n*) exec {tuneship} "$@" ;;\nesac\n'
    )


def in_the_way(found: Mapping[str, str], port: int) -> str:
    """Who would answer in place of the servers that the pages start; empty where nobody would.

    Verbs without `--url` ask the only server that runs, at any port; `top` says whether there is one.
    """
    if is_busy(port):
        return f"port {port} is in use, and the pages' servers need it"
    asked = subprocess.run(["tuneship", "top", "--once"], env=dict(found), capture_output=True, text=True, check=False)
    if "no server is running" in asked.stderr:
        return ""
    return f"a server of yours runs, and the pages' verbs would ask it: end it first\n{asked.stdout}{asked.stderr}"


def main() -> int:
    """As the docstring says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path, default=WALKED)
    parser.add_argument("--repo", type=Path, default=ROOT, help="whose recipes/ are copied into --work")
    parser.add_argument("--work", type=Path, default=Path("docs-walk"), help="a new folder")
    parser.add_argument("--tuneship", default="", help='how it is started, such as "python3 -m tuneship"')
    parser.add_argument("--engine-args", default="", help='for SGLang, such as "--attention-backend triton"')
    parser.add_argument("--limit-s", type=float, default=600, help="of one command")
    parser.add_argument("--port", type=int, default=PORT, help="of the servers, in place of the pages'")
    parser.add_argument("--gpu", action="store_true", help="also what needs one")
    given = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores it, and its children would
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    folder = given.work.resolve()
    if folder.exists():
        parser.error(f"{folder} is there already: name a new --work")
    found = environment(folder, given.tuneship, given.engine_args, given.port)
    if why := in_the_way(found, given.port):
        shutil.rmtree(folder)
        parser.error(why)
    shutil.copytree(given.repo / "recipes", folder / "recipes")
    failed = 0
    with contextlib.closing(Walk(folder, found, given.limit_s, port=given.port)) as walked:
        for outcome in walked.follow(given.pages, gpu=given.gpu):
            print(line(outcome), flush=True)
            if outcome.problem:
                failed += 1
                print(complaint(outcome), flush=True)
    print(f"{failed} failed")
    return 1 if failed else 0


def _unseen(step: Step, printed: str) -> str:
    missing = step.missing(printed)
    return f"it does not say {missing[0].strip()!r}" if missing else ""


def _text(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")


if __name__ == "__main__":
    sys.exit(main())
