"""One streamed chat completion: from a request to the record of what happened to it, and when.

A chunk counts when it carries tokens: text, reasoning, or a tool call. Token counts come from the server's `usage` and
from nothing else. With `ignore_eos`, a model may spend all its tokens on what is not text (an untrained one does): such
an answer has no first token that a user would see, hence no TTFT, so it is the error `no_content` and not a completed
request, however many tokens `usage` names. Counting it with the end of the stream as its TTFT would invent a latency.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

from tuneship.bench.load.sse import SseParser
from tuneship.bench.load.workload import Request

TIMEOUT = "timeout"
# libuv's timers count whole milliseconds and may fire a little early; what is left after that is not worth a sleep.
_TIMER_RESOLUTION_S = 0.0005
_DONE = b"[DONE]"
_ABORT = "abort"
"""SGLang ends a request that it drops with this reason, and status 200."""


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
    """Seconds since `start` (a perf_counter, by default now); uvloop's own clock has only milliseconds."""

    def __init__(self, start: float | None = None) -> None:
        self._start = time.perf_counter() if start is None else start

    def now(self) -> float:
        """This moment."""
        return time.perf_counter() - self._start

    async def sleep_until(self, at_s: float) -> None:
        """Return at `at_s`, never more than half a millisecond early."""
        while (wait := at_s - self.now()) > _TIMER_RESOLUTION_S:  # noqa: ASYNC110 - time passing is no event
            await asyncio.sleep(wait)


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[msgspec.Raw] | None = None

    @property
    def has_token(self) -> bool:
        return bool(self.content or self.reasoning_content or self.reasoning or self.tool_calls)


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Chunk(msgspec.Struct):
    """The fields of a chunk that are looked at. Others are skipped unread: half the time of a whole `json.loads`."""

    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode


def encode(request: Request) -> bytes:
    """The request's JSON body."""
    body = {
        "model": request.model,
        "messages": request.messages,
        "max_tokens": request.output_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if request.ignore_eos:
        body["ignore_eos"] = True  # strict servers refuse what they do not know: only where it is needed
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


def _take(kind: str, data: bytes, record: RequestRecord, arrived_s: float) -> None:
    """Act on one event."""
    if data == _DONE:
        record.finish(arrived_s, *_verdict(record))
        return
    try:
        chunk = _parse(data)
    except msgspec.MsgspecError:
        record.finish(arrived_s, "stream_error", f"not a chat completion chunk: {_text(data)}")
        return
    if kind == "error" or chunk.error or any(choice.finish_reason == _ABORT for choice in chunk.choices or ()):
        record.finish(arrived_s, "stream_error", _text(data))
        return
    if chunk.choices and (delta := chunk.choices[0].delta) and delta.has_token:
        record.chunks_s.append(arrived_s)
    if (usage := chunk.usage) and usage.prompt_tokens is not None and usage.completion_tokens is not None:
        record.input_tokens, record.output_tokens = usage.prompt_tokens, usage.completion_tokens


def _parse(data: bytes) -> _Chunk:
    """What of a chunk is looked at.

    Raises:
        msgspec.MsgspecError: no JSON, or not of that shape.

    """
    try:
        return _decode(data)
    except UnicodeDecodeError:  # half a character in the text is the model's business, not the client's
        return _decode(_text(data).encode())


def _text(data: bytes) -> str:
    return data.decode("utf-8", errors="replace")


def _verdict(record: RequestRecord) -> tuple[str, str]:
    if record.chunks_s and record.output_tokens:
        return "", ""
    usage_came = record.input_tokens or record.output_tokens  # there is no prompt without a token
    if record.chunks_s or not usage_came:
        return "missing_usage", "the server sent no usage: it must support stream_options.include_usage"
    return "no_content", f"no chunk had text, of {record.output_tokens} tokens: there is no first token to time"
