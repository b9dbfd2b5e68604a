"""A server of chat completions whose schedule is known, and which notes when it did what: the truth of the studies.

It streams answers on a fixed schedule from a process of its own and notes when a request arrived and when each chunk
with text was handed to the kernel. What it does for a request is in the model's name, `kind:gap in ms:number`. Any
other name is a steady answer of `max_tokens` chunks, one each `GAP_MS`, with a phase of its own: an engine's streams
would be as many bursts, and a client that reads them all late by the same time would look exact.

    with running_server() as url:
        ...                                # POST {url}/v1/chat/completions, many
        notes = collect_notes(url)         # {model, or model#number: [arrival, every chunk with text, end]}, seconds
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from tuneship.core.process import die_with_parent

KINDS = ("steady", "stall", "burst", "several", "empty", "no-usage", "http-429", "broken")
CHUNKS = 60
GAP_MS = 50
MODEL = "steady"
FIRST_S = 0.3
_STALL_S = 0.5
_GOLDEN = 0.618034
"""Multiples of it, modulo 1, are spread evenly however many there are."""

Notes = dict[str, list[float]]


class Step(NamedTuple):
    """When after its arrival a request gets which bytes, and how many of their events carry text."""

    at_s: float
    data: bytes
    texts: int


@contextmanager
def running_server(core: int | None = None) -> Iterator[str]:
    """URL of the server, in a process of its own; on one core of the machine, if that is named."""
    process = subprocess.Popen(
        [sys.executable, __file__],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=die_with_parent(signal.SIGTERM, os.getpid()),  # noqa: PLW1509 - two system calls, no locks
    )
    if core is not None:
        os.sched_setaffinity(process.pid, {core})
    assert process.stdout
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.communicate()


def collect_notes(url: str) -> Notes:
    """What was noted since the last time."""
    with urllib.request.urlopen(f"{url}/notes", timeout=30) as response:  # noqa: S310 - our own server's
        notes: Notes = json.load(response)
    return notes


def plan(kind: str, gap_s: float, chunks: int = CHUNKS, first_s: float = FIRST_S) -> list[Step]:
    """What the server does for a request of this kind, as a list of writes."""
    role, word, empty = _event({"role": "assistant", "content": ""}), _event({"content": "word "}), _event({})
    steps = [Step(first_s + index * gap_s, word, 1) for index in range(chunks)]
    if kind == "stall":
        half = chunks // 2
        steps = steps[:half] + [step._replace(at_s=step.at_s + _STALL_S) for step in steps[half:]]
    elif kind == "burst":
        steps = [step._replace(at_s=first_s + index // 4 * 4 * gap_s) for index, step in enumerate(steps)]
    elif kind == "several":
        steps = [step._replace(data=_event({"content": "three words here "})) for step in steps]
    elif kind == "empty":
        steps = [step for full in steps for step in (full, Step(full.at_s + gap_s / 2, empty, 0))]
    elif kind == "broken":
        return [Step(0, role, 0), *steps[:5], Step(steps[5].at_s, b'data: {"error": {"message": "so planned"}}\n\n', 0)]
    tokens = chunks * (3 if kind == "several" else 1)
    usage = {"prompt_tokens": 7, "completion_tokens": tokens, "total_tokens": 7 + tokens}
    last = b"data: " + json.dumps({"object": "chat.completion.chunk", "choices": [], "usage": usage}).encode() + b"\n\n"
    end = (b"" if kind == "no-usage" else last) + b"data: [DONE]\n\n"
    return [Step(0, role, 0), *steps, Step(steps[-1].at_s, end, 0)]


def _event(delta: dict[str, str]) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
    body = {"id": "0" * 32, "object": "chat.completion.chunk", "created": 0, "model": "truth", "choices": [choice]}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


class _Server(asyncio.Protocol):
    """As little HTTP as it takes, so that the server is not what is slow: asyncio's own transport writes at once."""

    _transport: asyncio.Transport

    def __init__(self, notes: Notes) -> None:
        self.notes = notes
        self._loop = asyncio.get_running_loop()
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        arrived_s = time.perf_counter()
        self._received += data
        head, blank, body = self._received.partition(b"\r\n\r\n")
        if not blank or len(body) < _content_length(head):
            return
        self._received = b""
        if head.startswith(b"GET "):
            self._get(head.split(b" ", 2)[1])
        else:
            self._answer(json.loads(body), arrived_s)

    def _get(self, path: bytes) -> None:
        if path == b"/notes":
            self._reply(b"200 OK", json.dumps(self.notes).encode())
            self.notes.clear()
        elif path == b"/v1/models":
            self._reply(b"200 OK", json.dumps({"object": "list", "data": [{"id": MODEL, "object": "model"}]}).encode())
        elif path == b"/health":
            self._reply(b"200 OK", b"{}")
        else:
            self._reply(b"404 Not Found", b"{}")

    def _answer(self, body: dict[str, Any], arrived_s: float) -> None:
        model: str = body["model"]
        kind, _, rest = model.partition(":")
        if kind == "http-429":
            self._reply(b"429 Too Many Requests", b'{"error": {"message": "so planned"}}')
            return
        if rest:
            name, steps = model, plan(kind, int(rest.split(":")[0]) / 1e3)
        else:
            name, gap_s = f"{model}#{len(self.notes)}", GAP_MS / 1e3
            chunks = body.get("max_completion_tokens") or body.get("max_tokens") or CHUNKS
            steps = plan("steady", gap_s, chunks, FIRST_S + len(self.notes) * _GOLDEN % 1 * gap_s)
        self.notes[name] = note = [arrived_s]
        self._transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        self._stream(steps, 0, note)

    def _stream(self, steps: Sequence[Step], index: int, note: list[float]) -> None:
        """Write what is due from `index` on, and come back for the rest: cheaper than a task a stream."""
        for at, (at_s, data, texts) in enumerate(steps[index:], index):
            now_s = time.perf_counter()
            if note[0] + at_s > now_s:
                self._loop.call_at(note[0] + at_s, self._stream, steps, at, note)  # both clocks are CLOCK_MONOTONIC
                return
            self._transport.write(b"%x\r\n%s\r\n" % (len(data), data))
            note += [now_s] * texts
        note.append(now_s)
        self._transport.write(b"0\r\n\r\n")

    def _reply(self, status: bytes, body: bytes) -> None:
        head = b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        self._transport.write(head % (status, len(body)) + body)


def _content_length(head: bytes) -> int:
    lines = (line.partition(b":") for line in head.split(b"\r\n"))
    return next((int(value) for name, _, value in lines if name.lower() == b"content-length"), 0)


async def _serve() -> None:
    gc.disable()  # it lives for minutes, and a collection would be a stall that nobody planned
    notes: Notes = {}
    server = await asyncio.get_running_loop().create_server(lambda: _Server(notes), "127.0.0.1", 0, backlog=2048)
    sys.stdout.write(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve())
