"""What the outermost layer sees of answers of every kind, through a real server where the wire matters."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.unit.serve.listening import listening
from tuneship.serve.guard import our_fault
from tuneship.serve.metrics import Live, Metrics
from tuneship.serve.observe import Observed, Usage, find_usage
from tuneship.serve.refusals import Refusal, engine_unavailable
from tuneship.serve.routes import LEASE

SQL = "sql@3fa9"
CHAT = "/v1/chat/completions"
USAGE = {"prompt_tokens": 7, "total_tokens": 12, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 2}}
DONE = b"data: [DONE]\n\n"


def event(**data: object) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()


class Lease:
    """Stands where the door puts one; counts how often it was released."""

    def __init__(self) -> None:
        self.entry = SimpleNamespace(version=SQL)
        self.released = 0

    def release(self) -> None:
        self.released += 1


class Door:
    """A Starlette application whose one route answers by `script`, observed."""

    def __init__(self, path: str = CHAT) -> None:
        self.metrics = Metrics(Live)
        self.metrics.serving([SQL])
        self.lease = Lease()
        self.script = self.refuse
        self.inner = Starlette(
            routes=[Route(path, self.handle, methods=["POST"])], exception_handlers={Refusal: self.refused}
        )
        self.app = Observed(self.inner, self.metrics)

    async def handle(self, request: Request) -> Response:
        await request.body()
        request.scope[LEASE] = self.lease
        return await self.script()

    async def refused(self, _: Request, error: Exception) -> Response:
        assert isinstance(error, Refusal)
        return error.response()

    async def refuse(self) -> Response:
        raise Refusal(400, "unsupported_parameter", "No.", version=SQL)

    def counts(self) -> dict[str, float]:
        """The samples of one version that are not 0, by their short name; and the refusals."""
        lines = [line.rpartition(" ") for line in self.metrics.text().decode().splitlines() if line[0] != "#"]
        return {name: float(value) for name, _, value in lines if float(value) and "_bucket" not in name}

    async def ask(self, path: str = CHAT) -> list[dict]:
        """POST without a wire; the messages that came."""
        sent: list[dict] = []

        async def receive() -> dict:
            if sent or received:
                await asyncio.sleep(60)
            received.append(1)
            return {"type": "http.request", "body": b"{}"}

        async def send(message) -> None:
            sent.append(message)

        received: list[int] = []
        scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b"", "root_path": ""}
        await self.app(scope, receive, send)
        return sent


def of(name: str, **labels: str) -> str:
    inside = ",".join(f'{key}="{value}"' for key, value in sorted({"alias": "sql", "version": SQL, **labels}.items()))
    return f"tuneship_{name}{{{inside}}}"


@pytest.fixture
def door() -> Door:
    return Door()


@pytest.fixture
async def client(door: Door) -> AsyncIterator[aiohttp.ClientSession]:
    async with listening(door.app) as (url, _), aiohttp.ClientSession(url) as session:
        yield session


async def over(door: Door) -> None:
    """Wait until the lease came back."""
    async with asyncio.timeout(5):
        while not door.lease.released:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_a_whole_answer(door: Door, client: aiohttp.ClientSession):
    async def answer() -> Response:
        await asyncio.sleep(0.05)
        return JSONResponse(
            {"choices": [{"message": {"content": 'a "usage": {"completion_tokens": 9}'}}], "usage": USAGE}
        )

    door.script = answer
    assert (await (await client.post(CHAT)).json())["usage"] == USAGE
    await over(door)
    counts = door.counts()
    assert counts[of("requests_total", code="200")] == 1
    assert counts[of("prompt_tokens_total")] == 7
    assert counts[of("completion_tokens_total")] == 5
    assert 0.05 <= counts[of("e2e_request_latency_seconds_sum")] < 1
    assert of("time_to_first_token_seconds_count") not in counts  # its first chunk is its end


async def test_a_stream(door: Door, client: aiohttp.ClientSession):
    async def events() -> AsyncIterator[bytes]:
        await asyncio.sleep(0.05)
        yield event(choices=[{"delta": {"content": "a"}}], usage=None)
        await asyncio.sleep(0.1)
        yield event(choices=[{"delta": {"content": "b"}}], usage=None)
        yield event(choices=[], usage=USAGE)
        yield DONE

    async def answer() -> Response:
        return StreamingResponse(events(), media_type="text/event-stream")

    door.script = answer
    body = await (await client.post(CHAT)).read()
    assert body.count(b"\n\n") == 4
    await over(door)
    counts = door.counts()
    assert counts[of("requests_total", code="200")] == 1
    assert counts[of("completion_tokens_total")] == 5
    assert of("chunks_total") not in counts, "they are told"
    assert 0.05 <= counts[of("time_to_first_token_seconds_sum")] < 0.15
    assert 0.15 <= counts[of("e2e_request_latency_seconds_sum")] < 1


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
@pytest.mark.parametrize("joined", [False, True])
async def test_a_stream_that_says_no_usage_is_counted_by_its_events(path: str, joined: bool):
    door = Door(path)
    texts = [event(choices=[{"delta": {"content": text}}]) for text in ("a", "\n\n", '\n\ndata: "usage"')]
    frame = [[event(role="assistant")], [event(finish_reason="stop")]] if path == CHAT else [[], []]
    events = [*frame[0], *texts, *frame[1], DONE]

    async def answer() -> Response:
        async def parts() -> AsyncIterator[bytes]:
            for part in [b"".join(events)] if joined else events:
                yield part

        return StreamingResponse(parts(), media_type="text/event-stream")

    door.script = answer
    await door.ask(path)
    counts = door.counts()
    assert counts[of("chunks_total")] == 3
    assert of("completion_tokens_total") not in counts


async def test_a_client_that_leaves_in_the_middle(door: Door, client: aiohttp.ClientSession):
    async def events() -> AsyncIterator[bytes]:
        yield event(n=1)
        await asyncio.sleep(60)

    async def answer() -> Response:
        return StreamingResponse(events(), media_type="text/event-stream")

    door.script = answer
    response = await client.post(CHAT)
    await response.content.readuntil(b"\n\n")
    response.close()
    await over(door)
    counts = door.counts()
    assert counts[of("requests_total", code="499")] == 1
    assert counts[of("time_to_first_token_seconds_count")] == 1
    assert of("e2e_request_latency_seconds_count") not in counts


async def test_a_client_that_hangs_up_after_the_last_event_has_its_answer(door: Door, client: aiohttp.ClientSession):
    async def events() -> AsyncIterator[bytes]:
        yield event(choices=[], usage=USAGE)
        yield DONE
        await asyncio.sleep(60)

    async def answer() -> Response:
        return StreamingResponse(events(), media_type="text/event-stream")

    door.script = answer
    response = await client.post(CHAT)
    await response.content.readuntil(DONE)
    response.close()
    await over(door)
    assert door.counts()[of("requests_total", code="200")] == 1


@pytest.mark.parametrize(
    ("last", "status", "code"),
    [
        (engine_unavailable(SQL).event(), 503, "engine_unavailable"),
        (Refusal(504, "timeout", "Too long.").event(), 504, "timeout"),
        (our_fault().event(), 500, "internal_error"),
        (event(error={"message": "whose?", "code": "else"}), 502, "engine_error"),
        (event(error={"object": "error", "message": "too long", "code": 400}) + DONE, 400, "invalid_request"),
        (event(error={"object": "error", "message": "/a/path", "code": 500}) + DONE, 502, "engine_error"),
    ],
)
async def test_a_stream_that_ends_with_an_error(door: Door, last: bytes, status: int, code: str):
    async def events() -> AsyncIterator[bytes]:
        yield event(n=1) + event(choices=[{"delta": {"content": 'data: {"error"'}}])
        yield last

    async def answer() -> Response:
        return StreamingResponse(events(), media_type="text/event-stream")

    door.script = answer
    await door.ask()
    counts = door.counts()
    assert counts[of("requests_total", code=str(status))] == 1
    assert counts[f'tuneship_refusals_total{{code="{code}",model="sql"}}'] == 1
    assert of("time_to_first_token_seconds_count") not in counts


async def test_a_refusal_of_a_known_model(door: Door):
    assert (await door.ask())[0]["status"] == 400
    counts = door.counts()
    assert counts[of("requests_total", code="400")] == 1
    assert counts['tuneship_refusals_total{code="unsupported_parameter",model="sql"}'] == 1
    assert of("e2e_request_latency_seconds_count") not in counts
    assert door.lease.released == 1


async def test_a_refusal_before_a_model_is_known(door: Door):
    async def missing(_: Request) -> Response:
        raise Refusal(404, "model_not_found", "The model 'evil' does not exist.")

    door.inner.router.routes[0] = Route(CHAT, missing, methods=["POST"])
    await door.ask()
    counts = door.counts()
    assert counts == {'tuneship_refusals_total{code="model_not_found",model=""}': 1}


@pytest.mark.parametrize("started", [False, True])
async def test_a_fault_of_the_door_is_a_500_and_is_passed_on(door: Door, started: bool):
    async def broken() -> AsyncIterator[bytes]:
        yield event(n=1)
        raise KeyError("ours")

    async def answer() -> Response:
        if started:
            return StreamingResponse(broken(), media_type="text/event-stream")
        raise KeyError("ours")

    door.script = answer
    with pytest.raises((KeyError, ExceptionGroup)):
        await door.ask()
    assert door.counts()[of("requests_total", code="500")] == 1
    assert door.lease.released == 1


async def test_a_cancelled_request_gives_its_lease_back(door: Door):
    async def answer() -> Response:
        await asyncio.sleep(60)
        raise AssertionError

    door.script = answer
    asking = asyncio.create_task(door.ask())
    await asyncio.sleep(0.05)
    assert not door.lease.released
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert door.lease.released == 1
    assert door.counts()[of("requests_total", code="499")] == 1


async def test_other_paths_have_no_latency():
    door = Door("/v1/tokenize")

    async def answer() -> Response:
        return JSONResponse({"tokens": [1], "usage": USAGE})

    door.script = answer
    await door.ask("/v1/tokenize")
    assert door.counts() == {of("requests_total", code="200"): 1}


TEXT = st.one_of(st.text(), st.sampled_from(['"usage"', '"usage": {"completion_tokens": 9}', '\\"usage":', "usage"]))


@given(st.lists(TEXT), st.dictionaries(TEXT, st.floats(-9, 0)), st.integers(0, 10**6), st.booleans(), st.booleans())
def test_usage_is_the_answers_own(texts, logprobs, tokens, spaced, ascii_only):
    """Whatever the model said: `usage` stands beside it."""
    usage = {"prompt_tokens": 3, "completion_tokens": tokens, "details": {"n": None}}
    answer = {"choices": texts, "top_logprobs": [logprobs], "usage": usage, "metadata": {"weight_version": "default"}}
    separators = None if spaced else (",", ":")
    body = json.dumps(answer, separators=separators, ensure_ascii=ascii_only).encode()
    assert find_usage(body) == Usage(3, tokens)
    del answer["usage"]
    assert find_usage(json.dumps(answer, separators=separators, ensure_ascii=ascii_only).encode()) == Usage()


@pytest.mark.parametrize(
    "tail", [b"", b'"usage"', b'"usage":', b'"usage": null}', b'"usage": {"completion_tokens": "x"}']
)
def test_usage_that_is_none(tail: bytes):
    assert find_usage(tail) == Usage()


@pytest.mark.timing
async def test_watching_costs_microseconds():
    """Per chunk and per request, beside the same application bare; the best of several rounds."""
    door, chunks = Door(), 1000
    message = {"type": "http.response.body", "body": event(choices=[{"delta": {"content": "abc"}}]), "more_body": True}

    async def answer(scope, receive, send) -> None:
        scope[LEASE] = door.lease
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for _ in range(scope["chunks"]):
            await send(message)
        await send({"type": "http.response.body", "body": event(choices=[], usage=USAGE), "more_body": True})
        await send({"type": "http.response.body", "body": DONE, "more_body": False})

    async def nothing(*_: object) -> None:
        pass

    async def best_s(app, count: int, rounds: int = 30) -> float:
        times = []
        for _ in range(rounds):
            began = time.perf_counter()
            for _ in range(10):
                await app({"type": "http", "path": CHAT, "chunks": count}, nothing, nothing)
            times.append((time.perf_counter() - began) / 10)
        return min(times)

    watched = Observed(answer, door.metrics)
    long_s = await best_s(watched, chunks) - await best_s(answer, chunks)
    short_s = await best_s(watched, 0) - await best_s(answer, 0)
    per_chunk_us, per_request_us = 1e6 * (long_s - short_s) / chunks, 1e6 * short_s
    print(f"{per_chunk_us:.2f} us a chunk, {per_request_us:.1f} us a request")
    assert per_chunk_us < 3
    assert per_request_us < 50
