"""Requests that no client should send, at a door with a real engine behind it: all stays as it was, or the run fails.

It starts `tuneship serve` with a keys file, sends `malformed_requests.requests` over raw sockets, 16 at a time, and
then leaves `--half` requests half sent. It ends with exit code 1 when

- the door answered 5xx by itself, or 502 `engine_error` (SGLang's own 500) to a request with which nothing is wrong
  (`orderly.py`); other 502 are listed,
- one of the requests in order that go among the others was not answered with 200,
- an error was not in OpenAI's form, or an answer named a path, a source file or a traceback,
- a request got no answer within `--patience`, or none at all,
- the engine died, or no longer gives the same greedy answers,
- the door holds more memory or files than after its warm-up, the first tenth of the requests.

    .venv/bin/python bench/studies/malformed.py --requests 20000 --out found.json

Without `--model` it makes the tiny base and the eight adapters of `marker_server.py` for itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import awaited
import httpx
import psutil
from made import made
from malformed_requests import CHAT, IN_ORDER, Malformed, Target, http, requests
from marker_server import BASE, prepare
from orderly import in_order

from tuneship.core import hardware
from tuneship.core.endpoint import Endpoint
from tuneship.core.process import stop_tree
from tuneship.serve import keys  # the study is of serve: it makes the key that the server asks for

AT_ONCE = 16
_START_S = 240
_WARM_UP = 0.1
_GROWTH_BYTES = 32 << 20
_GROWTH_FILES = 8
_CONTEXT = 64
"""A request that turns out to be in order, without `max_tokens`, generates as much as this allows."""
_FORM = {"message", "type", "param", "code"}
_TELLS = re.compile(r"Traceback|File \\?\"|site-packages|\.py\b|\.cc\b|/(?:home|root|tmp|usr|work|project|var)/")


def halves(key: str) -> tuple[bytes, ...]:
    """Requests whose rest never comes."""
    whole = http(CHAT, b'{"model": "a", "messages": []}', key)
    return b"", whole[:20], whole[:90], whole[:-5]


class Answer(NamedTuple):
    """What came back. `status` 0: nothing did."""

    kind: str
    status: int
    code: str = ""
    fault: str = ""
    """Why it is none that we would want; empty: it is."""
    asked: str = ""
    """The request's body, where the engine answered 500 or nothing is wrong with it."""


class Held(NamedTuple):
    """What a process has."""

    rss_bytes: int
    files: int

    @classmethod
    def by(cls, process: psutil.Process) -> Held:
        """As it is now."""
        return cls(process.memory_info().rss, process.num_fds())


class Server(NamedTuple):
    """A door, its engine behind it, and a key for both."""

    endpoint: Endpoint
    process: psutil.Process
    key: str
    log: Path

    def greedy(self) -> list[str]:
        """What each model answers to the same question."""
        body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "temperature": 0}
        with httpx.Client(
            base_url=self.endpoint.url, headers={"Authorization": f"Bearer {self.key}"}, timeout=60
        ) as client:
            answers = [client.post(CHAT, json={**body, "model": model.name}) for model in self.endpoint.models]
        return [str(answer.raise_for_status().json()["choices"][0]["message"]["content"]) for answer in answers]


def main() -> int:
    """Run it."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="malformed-") as name, _served(Path(name), arguments) as server:
        before = server.greedy()
        began = time.monotonic()
        found = asyncio.run(study(server, arguments))
        found["duration_s"] = round(time.monotonic() - began, 1)
        found["same_answers"] = server.process.is_running() and server.greedy() == before
        found["prompts_in_engine_log"] = "hello" in server.log.read_text(errors="replace")
    sound = found["same_answers"] and not found["prompts_in_engine_log"] and found["grew"]["fine"]
    found["fine"] = bool(sound and not found["faults"] and found["sent"])
    text = json.dumps(_described(arguments) | found, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    return 0 if found["fine"] else 1


async def study(server: Server, arguments: argparse.Namespace) -> dict[str, Any]:
    """Send everything; counts, faults, and what the door holds more than after the warm-up."""
    target = Target([model.name for model in server.endpoint.models], server.key)
    cases = list(requests(arguments.requests, arguments.seed, target))
    warm = int(len(cases) * _WARM_UP)
    until = time.monotonic() + arguments.within
    answers = await send_all(server.endpoint.url, cases[:warm], arguments.patience, until)
    held = Held.by(server.process)
    answers += await send_all(server.endpoint.url, cases[warm:], arguments.patience, until)
    sent = len(answers)
    begun = halves(server.key)
    waiting = [Malformed("half", begun[n % len(begun)], unanswered=True) for n in range(arguments.half)]
    patience_s = arguments.patience
    answers += await asyncio.gather(*(send(server.endpoint.url, each, patience_s, hang_up=False) for each in waiting))
    await asyncio.sleep(3)  # connections that are being closed
    after = Held.by(server.process)
    faults = Counter(f"{answer.kind}: {answer.fault}" for answer in answers if answer.fault)
    return {
        "sent": sent,
        "statuses": _table(answers),
        "codes": dict(Counter(answer.code for answer in answers if answer.code).most_common()),
        "engines_500": [answer.asked for answer in answers if answer.status == 502],
        "faults": dict(faults),
        "faults_at": [answer.asked for answer in answers if answer.fault and answer.asked][:20],
        "grew": {
            "rss_bytes": after.rss_bytes - held.rss_bytes,
            "files": after.files - held.files,
            "fine": after.rss_bytes - held.rss_bytes < _GROWTH_BYTES and after.files - held.files < _GROWTH_FILES,
        },
    }


async def send_all(url: str, cases: list[Malformed], patience_s: float, until: float = math.inf) -> list[Answer]:
    """Send `cases`, `AT_ONCE` at a time, as many as begin before `until` (monotonic seconds)."""
    waiting = iter(cases)

    async def worker() -> list[Answer]:
        return [await send(url, case, patience_s) for case in waiting if time.monotonic() < until]

    return [answer for answers in await asyncio.gather(*(worker() for _ in range(AT_ONCE))) for answer in answers]


async def send(url: str, case: Malformed, patience_s: float, *, hang_up: bool = True) -> Answer:
    """Send one and judge what comes back; `hang_up` says that nothing more will be sent."""
    host, port = url.removeprefix("http://").rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 24)
    try:
        async with asyncio.timeout(patience_s):
            writer.write(case.sent)
            if case.unanswered and hang_up:
                writer.write_eof()
            received = await reader.read()
    except TimeoutError:
        return Answer(case.kind, 0, fault="no answer, and no end")
    except ConnectionError:
        received = b""  # closed on what we were still sending
    finally:
        writer.close()
    return judged(case, received)


def judged(case: Malformed, received: bytes) -> Answer:
    """Whether `received` is an answer that a client can do something with."""
    if not received:
        return Answer(case.kind, 0, fault="" if case.unanswered else "no answer")
    head, _, body = received.partition(b"\r\n\r\n")
    if head.startswith(b"HTTP/1.1 100"):
        head, _, body = body.partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    if len(words) < 3 or not words[1].isdigit():
        return Answer(case.kind, 0, fault="not HTTP")
    status = int(words[1])
    told = _TELLS.search(body.decode(errors="replace")) if status >= 400 else None
    if told:
        return Answer(case.kind, status, fault=f"tells {told[0]!r}")
    if status < 400 or case.sent.startswith(b"HEAD"):
        broken = case.kind == IN_ORDER and b'{"error"' in body
        return Answer(case.kind, status, fault="our 500" if status == 500 else "an error in mid-stream" * broken)
    length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    try:
        error = json.loads(body[: int(length[1])] if length else body)["error"]  # another answer may follow
        in_form = error.keys() == _FORM
    except (ValueError, LookupError, TypeError, AttributeError):
        return Answer(case.kind, status, fault=f"{status} not in OpenAI's form")
    fault = f"{status} {error['code']}" if status >= 500 and status != 502 else ""
    if case.kind == IN_ORDER or (status == 502 and in_order(case.sent)):
        fault = f"{status} {error['code']} to a request in order"
    asked = case.sent.partition(b"\r\n\r\n")[2].decode(errors="replace")[:500] if fault or status == 502 else ""
    return Answer(case.kind, status, str(error["code"]), fault if in_form else "another form", asked)


def _served(folder: Path, arguments: argparse.Namespace) -> AbstractContextManager[Server]:
    if arguments.model:
        return served(folder, arguments.model, arguments.adapters)
    prepare(folder)
    return served(folder, folder / BASE, folder / "first")


@contextmanager
def served(folder: Path, model: Path, adapters: Path | None) -> Iterator[Server]:
    """`tuneship serve` with a key, until the block ends."""
    key = keys.add(folder / "keys.toml", "study")
    log = folder / "engine.log"
    argv = [sys.executable, "-m", "tuneship", "serve", str(model), "--port", "0", "--dtype", "float32"]
    argv += ["--context-length", str(_CONTEXT)]
    argv += ["--keys", str(folder / "keys.toml"), "--endpoint-file", str(folder / "endpoint.json"), "--log", str(log)]
    argv += ["--adapters", str(adapters)] if adapters else []
    process = subprocess.Popen(argv)
    try:
        endpoint = awaited.endpoint(process, folder / "endpoint.json", _START_S)
        if endpoint is None:
            raise SystemExit("the server did not start")
        yield Server(endpoint, psutil.Process(process.pid), key, log)
    finally:
        stop_tree(process, 40)


def _table(answers: list[Answer]) -> dict[str, dict[str, int]]:
    kinds = sorted({answer.kind for answer in answers})
    return {kind: dict(Counter(str(a.status) for a in answers if a.kind == kind).most_common()) for kind in kinds}


def _described(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "command": shlex.join(["python", *sys.argv]),
        **made(),
        "hardware": hardware.detect()._asdict(),
        "versions": {name: metadata.version(name) for name in ("sglang", "starlette", "uvicorn", "h11", "aiohttp")},
        "requests": arguments.requests,
        "half": arguments.half,
        "seed": arguments.seed,
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--adapters", type=Path)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--half", type=int, default=50, help="requests that are never finished, all at once")
    parser.add_argument("--patience", type=float, default=90.0, help="seconds to wait for an answer")
    parser.add_argument("--within", type=float, default=math.inf, help="seconds after which no more are sent")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
