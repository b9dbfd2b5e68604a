"""What stands before the routes, on a real port: who comes in, and how much one request may take."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.unit.serve.listening import listening
from tuneship.core.errors import PreflightError
from tuneship.serve import guard, keys, protocol
from tuneship.serve.guard import LIMITS, Guard, Limits, check_listen
from tuneship.serve.keys import SCOPE_KEY, Keyring
from tuneship.serve.protocol import DoorProtocol

SECRET = "the prompt that nobody may read"
EVENT = b'data: {"n": 1}\n\n'


class Behind:
    """An application that does as its paths say."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.cancelled = asyncio.Event()
        self.go_on = asyncio.Event()
        self.connections: set = set()

    def app(self) -> Starlette:
        paths = {"/hang": self.hang, "/stream": self.stream, "/torn": self.torn, "/fail": self.fail}
        routes = [Route(path, handler, methods=["POST"]) for path, handler in paths.items()]
        free = [Route(path, self.who) for path in ("/who", "/health", "/metrics")]
        return Starlette(routes=[*routes, *free])

    async def who(self, request: Request) -> Response:
        self.asked.append(request.url.path)
        key = request.scope.get(SCOPE_KEY)
        return PlainTextResponse(key.name if key else "anybody")

    async def hang(self, request: Request) -> Response:
        await request.body()
        self.asked.append(request.url.path)
        try:
            await asyncio.wait_for(self.go_on.wait(), timeout=60)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return PlainTextResponse("late")

    async def stream(self, _: Request) -> Response:
        async def events() -> AsyncIterator[bytes]:
            yield EVENT
            await asyncio.sleep(60)

        return StreamingResponse(events(), media_type="text/event-stream")

    async def torn(self, _: Request) -> Response:
        async def events() -> AsyncIterator[bytes]:
            yield EVENT
            raise ValueError(SECRET)

        return StreamingResponse(events(), media_type="text/event-stream")

    async def fail(self, request: Request) -> Response:
        raise ValueError(await request.body(), SECRET)


@pytest.fixture
def behind() -> Behind:
    return Behind()


@pytest.fixture
def keyring(tmp_path: Path) -> Keyring:
    """No key at all."""
    return Keyring(tmp_path / "keys.toml", {})


@contextlib.asynccontextmanager
async def opened(behind: Behind, keyring: Keyring, limits: Limits = LIMITS) -> AsyncIterator[aiohttp.ClientSession]:
    app = Guard(behind.app(), keyring, limits)
    async with listening(app, http=DoorProtocol, ws="none") as (url, server):
        behind.connections = server.server_state.connections
        async with aiohttp.ClientSession(url) as session:
            yield session


async def error_of(response: aiohttp.ClientResponse) -> dict:
    body = await response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    return body["error"]


async def raw(session: aiohttp.ClientSession, sent: bytes, *, timeout_s: float = 10) -> bytes:
    """All that comes back for `sent`, until the door closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", session._base_url.port)
    writer.write(sent)
    try:
        return await asyncio.wait_for(reader.read(), timeout_s)
    finally:
        writer.close()


def parsed(answer: bytes) -> tuple[int, dict]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


# --- who comes in


async def test_without_keys_anybody(behind, keyring):
    async with opened(behind, keyring) as door:
        assert await (await door.get("/who")).text() == "anybody"


async def test_with_keys_only_who_has_one(behind, tmp_path):
    secret = keys.add(tmp_path / "keys.toml", "ci", ["sql"])
    async with opened(behind, Keyring(tmp_path / "keys.toml", {})) as door:
        response = await door.get("/who")
        assert response.status == 401
        assert response.headers["WWW-Authenticate"].startswith("Bearer")
        assert (await error_of(response))["code"] == "missing_api_key"
        wrong = await door.get("/who", headers={"Authorization": "Bearer ts-wrong"})
        assert (wrong.status, (await error_of(wrong))["code"]) == (401, "invalid_api_key")
        assert not behind.asked
        held = {"Authorization": f"Bearer {secret}"}
        assert await (await door.get("/who", headers=held)).text() == "ci"
        assert (await door.get("/health")).status == 200, "a load balancer has no key"
        metrics = await door.get("/metrics", headers=held)
        assert (metrics.status, (await error_of(metrics))["code"]) == (403, "not_allowed")


async def test_the_metrics_are_for_who_may_use_all_models(behind, tmp_path):
    secret = keys.add(tmp_path / "keys.toml", "prometheus")
    async with opened(behind, Keyring(tmp_path / "keys.toml", {})) as door:
        assert (await door.get("/metrics")).status == 401
        assert (await door.get("/metrics", headers={"Authorization": f"Bearer {secret}"})).status == 200


async def test_who_may_not_come_in_is_not_read(behind, tmp_path):
    """An answer before the body: nobody sends 10 MB for a 401."""
    keys.add(tmp_path / "keys.toml", "ci")
    async with opened(behind, Keyring(tmp_path / "keys.toml", {})) as door:
        head = b"POST /hang HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", door._base_url.port)
        writer.write(head)
        assert (await asyncio.wait_for(reader.readuntil(b"\r\n"), 5)).split()[1] == b"401"
        writer.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_no_key(host, keyring):
    check_listen(host, keyring)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "a-name", ""])
def test_beyond_loopback_there_is_a_key_or_no_server(host, keyring, tmp_path):
    with pytest.raises(PreflightError, match="no API key") as caught:
        check_listen(host, keyring)
    assert "tuneship keys add" in caught.value.hint
    check_listen(host, Keyring(tmp_path / "none", {"TUNESHIP_API_KEY": "x" * 20}))
    keys.add(tmp_path / "keys.toml", "ci")
    check_listen(host, Keyring(tmp_path / "keys.toml", {}))
    keys.revoke(tmp_path / "keys.toml", "ci")
    with pytest.raises(PreflightError):
        check_listen(host, Keyring(tmp_path / "keys.toml", {}))


# --- how much of it


async def test_headers_that_are_too_large(behind, keyring):
    async with opened(behind, keyring, Limits(header_bytes=1000)) as door:
        assert (await door.get("/who", headers={"X-Pad": "x" * 500})).status == 200
        for too_large in ({"headers": {"X-Pad": "x" * 1000}}, {"params": {"pad": "x" * 1000}}):
            response = await door.get("/who", **too_large)
            assert response.status == 431
            assert (await error_of(response))["code"] == "headers_too_large"
        many = {f"X-{n}": "x" for n in range(300)}
        assert (await door.get("/who", headers=many)).status == 431


async def test_headers_without_an_end(behind, keyring):
    async with opened(behind, keyring) as door:
        status, error = parsed(await raw(door, b"GET /who HTTP/1.1\r\n" + b"X-Pad: x\r\n" * 50_000))
        assert (status, error["code"]) == (431, "headers_too_large")


async def test_a_request_that_takes_too_long(behind, keyring):
    async with opened(behind, keyring, Limits(request_s=0.2)) as door:
        response = await door.post("/hang")
        assert response.status == 504
        assert (await error_of(response))["code"] == "timeout"
        await asyncio.wait_for(behind.cancelled.wait(), 5)


async def test_a_stream_that_takes_too_long_ends_with_an_error_event(behind, keyring):
    async with opened(behind, keyring, Limits(request_s=0.3)) as door:
        response = await door.post("/stream")
        assert response.status == 200
        first, last, nothing = (await response.read()).split(b"\n\n")
        assert first + b"\n\n" == EVENT
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "timeout"
        assert nothing == b""


async def test_more_requests_than_the_door_takes(behind, keyring):
    async with opened(behind, keyring, Limits(in_flight=2)) as door:
        first = [asyncio.create_task(door.post("/hang")) for _ in range(2)]
        while len(behind.asked) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        refused = await door.post("/hang")
        assert refused.status == 429
        assert int(refused.headers["Retry-After"]) > 0
        assert (await error_of(refused))["code"] == "too_many_requests"
        assert (await door.get("/who")).status == 200, "what the door answers alone goes on"
        behind.go_on.set()
        assert [(await response).status for response in first] == [200, 200]
        assert (await door.post("/hang")).status == 200, "and there is room again"


async def test_who_left_takes_no_room(behind, keyring):
    async with opened(behind, keyring, Limits(in_flight=1, request_s=0.3)) as door:
        with pytest.raises(TimeoutError):
            await door.post("/hang", timeout=aiohttp.ClientTimeout(total=0.1))
        await asyncio.wait_for(behind.cancelled.wait(), 5)
        behind.go_on.set()
        assert (await door.post("/hang")).status == 200


# --- what it says


@pytest.mark.parametrize("path", ["/fail", "/torn"])
async def test_a_bug_of_ours_tells_nobody_anything(behind, keyring, capfd, caplog, path):
    async with opened(behind, keyring) as door:
        response = await door.post(path, data=SECRET.encode())
        answer = await response.read()
        assert (await door.get("/who")).status == 200
    assert b"internal_error" in answer or response.status == 500
    said = capfd.readouterr().err
    assert "ValueError at test_guard.py:" in said
    for text in (answer.decode(), said, caplog.text):
        assert SECRET not in text
        assert "Traceback" not in text
        assert str(Path(__file__).parent) not in text


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET\r\n\r\n", 400),
        (b"GET /who HTTP/1.1\r\n\r\n", 400),
        (b"GET /wh o HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"POST /hang HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /hang HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"POST /hang HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n", 400),
        (b"POST /hang HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nnot hex\r\n", 400),
    ],
)
async def test_what_is_no_http(behind, keyring, sent, status):
    async with opened(behind, keyring) as door:
        found, error = parsed(await raw(door, sent))
        assert (found, error["code"]) == (status, "invalid_http")
        assert (await door.get("/who")).status == 200


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "REQUEST_WITHIN_S", 0.3)


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize("sent", [b"GET /who HT", b"GET /who HTTP/1.1\r\nHost: a\r\nX-Slow: "])
async def test_half_a_request_is_not_waited_for(behind, keyring, sent):
    async with opened(behind, keyring) as door:
        status, error = parsed(await raw(door, sent))
        assert (status, error["code"]) == (408, "request_timeout")


@pytest.mark.usefixtures("_impatient")
async def test_who_says_nothing_is_not_waited_for(behind, keyring):
    async with opened(behind, keyring) as door:
        assert await raw(door, b"") == b""


@pytest.mark.usefixtures("_impatient")
async def test_an_idle_connection_is_kept_for_the_next_request_and_half_a_one_is_not(behind, keyring):
    """Clients keep connections for 5 to 90 s, and one that the door is just closing loses a request."""
    whole, half = b"GET /who HTTP/1.1\r\nHost: a\r\n\r\n", b"GET /who HTTP/1.1\r\nHo"
    async with opened(behind, keyring) as door:
        reader, writer = await asyncio.open_connection("127.0.0.1", door._base_url.port)
        for _ in range(3):
            writer.write(whole)
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
            assert head.startswith(b"HTTP/1.1 200 ")
            length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            await reader.readexactly(length)
            await asyncio.sleep(0.7)
        writer.write(half)
        assert b" 408 " in await asyncio.wait_for(reader.read(), 5)
        writer.close()


@pytest.mark.usefixtures("_impatient")
async def test_a_body_that_drips_after_the_answer_is_not_waited_for(behind, keyring):
    async with opened(behind, keyring) as door:
        reader, writer = await asyncio.open_connection("127.0.0.1", door._base_url.port)
        writer.write(b"POST /nowhere HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n")
        ended = asyncio.create_task(reader.read())
        for _ in range(40):
            writer.write(b"x")
            await asyncio.sleep(0.05)
            if ended.done():
                break
        assert b" 404 " in await asyncio.wait_for(ended, 1)
        writer.close()


@pytest.mark.usefixtures("_impatient")
async def test_a_request_that_is_being_answered_is_waited_for(behind, keyring):
    async with opened(behind, keyring) as door:
        asking = asyncio.create_task(door.post("/hang"))
        await asyncio.sleep(1)
        behind.go_on.set()
        assert (await asking).status == 200


async def test_a_client_that_reads_nothing_is_cut_off(behind, keyring, monkeypatch):
    """Its answer lies in the socket's buffers, and no error can be said any more."""
    monkeypatch.setattr(protocol, "_ANSWERED_WITHIN_S", 1.0)
    monkeypatch.setattr(guard, "_LAST_WORDS_S", 0.1)
    over = asyncio.Event()

    async def for_ever(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        try:
            while True:
                await send({"type": "http.response.body", "body": EVENT * 10_000, "more_body": True})
        finally:
            over.set()

    behind.app = lambda: for_ever  # type: ignore[method-assign]
    async with opened(behind, keyring, Limits(request_s=0.3)) as door:
        _reader, writer = await asyncio.open_connection("127.0.0.1", door._base_url.port, limit=1024)
        writer.write(b"POST / HTTP/1.1\r\nHost: a\r\n\r\n")
        await asyncio.wait_for(over.wait(), 5)
        assert len(behind.connections) == 1
        await asyncio.sleep(1.5)
        assert not behind.connections
        writer.close()


# --- what it costs


@pytest.mark.timing
async def test_a_chunk_costs_microseconds(keyring):
    """`bench/studies/guard_cost.py` says how many; here only that nobody adds much."""
    from tuneship.serve.guard import _Answer

    async def send(_) -> None:
        pass

    message = {"type": "http.response.body", "body": EVENT, "more_body": True}
    answer = _Answer({}, None, send)
    best = math.inf
    for _ in range(5):
        began = asyncio.get_running_loop().time()
        for _ in range(10_000):
            await answer.send(message)
        best = min(best, asyncio.get_running_loop().time() - began)
    assert best / 10_000 < 5e-6
