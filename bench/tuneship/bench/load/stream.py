"""One streamed chat completion: from a request to the record of what happened to it, and when."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tuneship.bench.load.sse import SseParser
from tuneship.bench.load.workload import Request

TIMEOUT = "timeout"
# libuv's timers count whole milliseconds and may fire a little early; what is left after that is not worth a sleep.
_TIMER_RESOLUTION_S = 0.0005


@dataclass(slots=True)
class RequestRecord:
    """What happened to one request. Times are seconds from the level's start; `error` is empty when it completed.

    It starts as a timeout and stays one if the level's deadline finds it unfinished.
    """

    model: str
    scheduled_s: float
    sent_s: float = 0.0
    end_s: float = 0.0
    chunks_s: list[float] = field(default_factory=list)
    """When each chunk with text arrived."""
    input_tokens: int = 0
    output_tokens: int = 0
    error: str = TIMEOUT
    detail: str = "no answer before the deadline"

    def finish(self, at_s: float, error: str = "", detail: str = "") -> None:
        """Record how it ended."""
        self.end_s, self.error, self.detail = at_s, error, detail[:500]


class Clock:
    """Seconds since it was made; perf_counter, because uvloop's own clock has only milliseconds."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def now(self) -> float:
        """This moment."""
        return time.perf_counter() - self._start

    async def sleep_until(self, at_s: float) -> None:
        """Return at `at_s`, never more than half a millisecond early."""
        while (wait := at_s - self.now()) > _TIMER_RESOLUTION_S:  # noqa: ASYNC110 - time passing is no event
            await asyncio.sleep(wait)


def encode(request: Request) -> bytes:
    """The request's JSON body."""
    body = {
        "model": request.model,
        "messages": [{"role": "user", "content": request.prompt}],
        "max_tokens": request.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(body).encode()


async def send(session: aiohttp.ClientSession, url: str, body: bytes, record: RequestRecord, clock: Clock) -> None:
    """Send `body` now, read the answer, and book both in `record`; raises nothing but cancellation."""
    record.sent_s = clock.now()
    try:
        async with session.post(url, data=body) as response:
            if response.status == 200:
                await _read(response, record, clock)
            else:
                text = await response.text(errors="replace")
                record.finish(clock.now(), f"http_{response.status}", text)
    except (aiohttp.ClientError, OSError) as error:
        if record.error == TIMEOUT:  # not if the answer was complete before the connection broke
            kind = "stream_closed" if record.chunks_s else "connection"
            record.finish(clock.now(), kind, f"{type(error).__name__}: {error}")
    except asyncio.CancelledError:
        record.end_s = record.end_s or clock.now()
        raise


async def _read(response: aiohttp.ClientResponse, record: RequestRecord, clock: Clock) -> None:
    """Read to the end of the stream; the record is final at `[DONE]`, the rest lets the connection be used again."""
    parser = SseParser()
    async for chunk in response.content.iter_any():
        arrived_s = clock.now()
        for event in parser.feed(chunk):
            if record.error == TIMEOUT:
                _take(event.type, event.data, record, arrived_s)
    if record.error == TIMEOUT:
        record.finish(clock.now(), "stream_closed", "the stream ended without [DONE]")


def _take(kind: str, data: str, record: RequestRecord, arrived_s: float) -> None:
    """Act on one event."""
    if data == "[DONE]":
        record.finish(arrived_s, *_verdict(record))
        return
    try:
        body = json.loads(data)
        failed = kind == "error" or bool(body.get("error")) or _aborted(body)
        if not failed:
            _book(body, record, arrived_s)
    except (ValueError, TypeError, AttributeError, LookupError):
        record.finish(arrived_s, "stream_error", f"not a chat completion chunk: {data}")
        return
    if failed:
        record.finish(arrived_s, "stream_error", data)


def _book(body: dict[str, Any], record: RequestRecord, arrived_s: float) -> None:
    choices = body.get("choices") or [{}]
    delta = choices[0].get("delta") or {}
    if delta.get("content") or delta.get("reasoning_content"):
        record.chunks_s.append(arrived_s)
    usage = body.get("usage")
    if usage:
        record.input_tokens = int(usage["prompt_tokens"])
        record.output_tokens = int(usage["completion_tokens"])


def _aborted(body: dict[str, Any]) -> bool:
    """SGLang ends a request that it drops with this reason, and status 200."""
    return any(choice.get("finish_reason") == "abort" for choice in body.get("choices") or ())


def _verdict(record: RequestRecord) -> tuple[str, str]:
    if not record.output_tokens:
        return "missing_usage", "the server sent no usage: it must support stream_options.include_usage"
    if not record.chunks_s:
        return "no_content", "the answer had no text"
    return "", ""
