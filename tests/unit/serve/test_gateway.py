"""The door, on a real port, in front of an engine that does as it is told: breaks off, hangs, refuses."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from tests.unit.serve.listening import answering, listening
from tuneship.serve import bodies
from tuneship.serve.bodies import MAX_BODY_BYTES
from tuneship.serve.catalog import Entry
from tuneship.serve.engine import free_port
from tuneship.serve.gateway import build_door
from tuneship.serve.metrics import CONTENT_TYPE, Live, Metrics
from tuneship.serve.observe import Observed
from tuneship.serve.registry import State, Version
from tuneship.serve.routes import Routes
from tuneship.serve.upstream import Upstream

BASE = Entry("org/base", "org/base@1", None, Path("/b"), "", "b")
SQL = Version("sql", "2" * 64, "b", Path("/s"), State.LIVE, 1.0, 3, pinned=False, verified="passed", changed_at="")
SELECTOR = "sql@222222222222#3"
VERSION = "sql@222222222222"
CHAT = "/v1/chat/completions"
EVENTS = (b'data: {"n": 1}\n\n', b'data: {"n": 2}\n\n', b"data: [DONE]\n\n")


class ScriptedEngine:
    """Remembers what it was asked and answers by `script`."""

    def __init__(self) -> None:
        self.bodies: list[dict] = []
        self.asked = asyncio.Event()
        self.left = asyncio.Event()
        self.script = self.echo

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.json())
        self.asked.set()
        return await self.script(request)

    async def metrics(self, request: web.Request) -> web.StreamResponse:
        return await self.script(request)

    async def echo(self, _: web.Request) -> web.StreamResponse:
        return web.json_response(self.bodies[-1])

    async def stream(self, request: web.Request, events=EVENTS, *, cut: bool = False) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for event in events:
            await response.write(event)
            await asyncio.sleep(0.01)
        if cut:
            request.transport.abort()
        return response

    async def hang(self, _: web.Request) -> web.StreamResponse:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.left.set()
            raise
        return web.Response()


@pytest.fixture
async def engine() -> AsyncIterator[tuple[ScriptedEngine, str]]:
    scripted = ScriptedEngine()
    app = web.Application(client_max_size=2 * MAX_BODY_BYTES)
    app.router.add_post("/v1/{path:.*}", scripted.handle)
    app.router.add_get("/metrics", scripted.metrics)
    # SGLang's server, too, gives up a request whose client went away.
    async with answering(app, handler_cancellation=True) as url:
        yield scripted, url


@pytest.fixture
async def door(engine) -> AsyncIterator[aiohttp.ClientSession]:
    async for session in open_door(engine[1]):
        yield session


async def open_door(
    engine_url: str, *, ready: bool = True, routes: Routes | None = None
) -> AsyncIterator[aiohttp.ClientSession]:
    routes = routes or Routes(BASE, (SQL,))
    async with Upstream(engine_url) as upstream:
        metrics = Metrics(Live)
        metrics.serving([BASE.version, VERSION])
        app = Observed(build_door(routes, upstream, metrics, lambda: ready), metrics)
        async with listening(app) as (url, _), aiohttp.ClientSession(url) as session:
            yield session
    assert not routes.all_in_flight(), "a lease is out for ever"


async def error_of(response: aiohttp.ClientResponse) -> dict:
    body = await response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    return body["error"]


async def test_models_are_the_catalogs(door):
    listed = await (await door.get("/v1/models")).json()
    assert [card["id"] for card in listed["data"]] == ["org/base", "sql"]
    assert listed["data"][0].keys() == {"id", "object", "created", "owned_by", "version", "end_token_ids"}
    assert listed["data"][1].items() >= {"parent": "b", "version": VERSION}.items()
    one = await door.get("/v1/models/org/base")
    assert (await one.json()) == listed["data"][0]
    assert one.headers["x-tuneship-version"] == "org/base@1"
    assert (await error_of(await door.get("/v1/models/nobody")))["code"] == "model_not_found"


async def test_the_model_decides_who_answers(door):
    for name, selector, version in (
        ("org/base", None, "org/base@1"),
        ("sql", SELECTOR, VERSION),
        (VERSION, SELECTOR, VERSION),
    ):
        response = await door.post(CHAT, json={"model": name, "messages": []})
        assert response.headers["x-tuneship-version"] == version
        sent = await response.json()
        assert sent["model"] == name
        assert sent.get("lora_path") == selector


@pytest.mark.parametrize(
    "name", ["nobody", "org/base:sql", ":sql", "sql:", "sql@2", SELECTOR, "", None, 3, ["sql"], {"a": 1}]
)
async def test_anything_else_is_not_found(door, engine, name):
    response = await door.post(CHAT, json={"model": name, "messages": []})
    assert response.status == 404
    assert (await error_of(response))["code"] == "model_not_found"
    assert not engine[0].bodies


async def test_no_model_at_all(door):
    response = await door.post("/v1/completions", json={"prompt": "a"})
    assert response.status == 404
    assert (await error_of(response))["code"] == "model_not_found"


@pytest.mark.parametrize("key", ["lora_path", "extra_key", "session_params", "rid"])
async def test_the_engines_own_keys_are_refused(door, engine, key):
    response = await door.post(CHAT, json={"model": "org/base", "messages": [], key: "sql@2"})
    assert response.status == 400
    assert (await error_of(response))["param"] == key
    assert response.headers["x-tuneship-version"] == "org/base@1"
    assert not engine[0].bodies


async def test_tokens_are_not_streamed(door, engine):
    asked = {"model": "org/base", "prompt": "a"}
    assert (await door.post("/v1/tokenize", json=asked | {"stream": False})).status == 200
    sent = len(engine[0].bodies)
    response = await door.post("/v1/tokenize", json=asked | {"stream": True})
    assert response.status == 400
    assert (await error_of(response))["param"] == "stream"
    assert response.headers["x-tuneship-version"] == "org/base@1"
    assert len(engine[0].bodies) == sent


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"sql"', b"\xff\xfe", b'{"model": NaN}', b"[" * 100_000])
async def test_bodies_that_are_no_request(door, body):
    response = await door.post(CHAT, data=body)
    assert response.status == 400
    assert (await error_of(response))["code"] == "invalid_json"


async def test_a_body_that_is_too_large(door, engine):
    body = json.dumps({"model": "sql", "pad": "x" * MAX_BODY_BYTES}).encode()

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 1 << 20):
            yield body[start : start + (1 << 20)]

    response = await door.post(CHAT, data=chunks())
    assert response.status == 413
    assert (await error_of(response))["code"] == "request_too_large"
    assert not engine[0].bodies


async def test_a_body_that_drips(door, engine, monkeypatch):
    monkeypatch.setattr(bodies, "BODY_WITHIN_S", 0.3)

    async def drops() -> AsyncIterator[bytes]:
        for _ in range(50):
            yield b" "
            await asyncio.sleep(0.1)

    response = await door.post(CHAT, data=drops())
    assert response.status == 408
    assert (await error_of(response))["code"] == "request_timeout"
    assert not engine[0].bodies


async def test_what_would_end_the_engine_does_not_reach_it(door, engine):
    response = await door.post("/v1/completions", json={"model": "sql", "prompt": [-1]})
    assert response.status == 400
    assert (await error_of(response))["param"] == "prompt"
    assert response.headers["x-tuneship-version"] == VERSION
    assert not engine[0].bodies


async def test_a_method_that_a_route_does_not_have(door, engine):
    """Of routes that it does not have: test_native_routes.py."""
    for path, method in (("/v1/models", "PUT"), (CHAT, "GET"), ("/v1/tokenize", "DELETE")):
        response = await door.request(method, path, json={"model": "sql"})
        assert response.status == 405
        await error_of(response)
    assert not engine[0].bodies


async def test_streamed_bytes_are_untouched(door, engine):
    engine[0].script = engine[0].stream
    response = await door.post(CHAT, json={"model": "sql", "stream": True})
    assert response.content_type == "text/event-stream"
    assert response.headers["x-tuneship-version"] == VERSION
    assert await response.read() == b"".join(EVENTS)


async def test_events_are_not_held_back(door, engine):
    scripted = engine[0]
    go_on = asyncio.Event()

    async def first_then_wait(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(EVENTS[0])
        await go_on.wait()
        await response.write(EVENTS[2])
        return response

    scripted.script = first_then_wait
    response = await door.post(CHAT, json={"model": "sql", "stream": True})
    assert await asyncio.wait_for(response.content.readany(), timeout=5) == EVENTS[0]
    go_on.set()
    assert await response.read() == EVENTS[2]


@pytest.mark.parametrize("torn", [EVENTS[:2], (EVENTS[0], b'data: {"n'), (b'data: {"n',), ()], ids=len)
@pytest.mark.parametrize("cut", [True, False], ids=["reset", "clean end"])
async def test_a_stream_that_breaks_off_ends_with_an_error(door, engine, torn, cut):
    engine[0].script = lambda request: engine[0].stream(request, torn, cut=cut)
    response = await door.post(CHAT, json={"model": "sql", "stream": True})
    events = (await response.read()).split(b"\n\n")
    assert events.pop() == b"", "the last event is complete"
    assert json.loads(events.pop().removeprefix(b"data: "))["error"]["code"] == "engine_unavailable"
    assert events == [event.removesuffix(b"\n\n") for event in torn if event.endswith(b"\n\n")]


async def test_a_canary_answers_its_share(engine):
    canary = SQL._replace(content_id="3" * 64, state=State.CANARY, weight=0.25)
    routes = Routes(BASE, (SQL._replace(weight=0.75), canary), seed=1)
    async for door in open_door(engine[1], routes=routes):
        answers = [await door.post(CHAT, json={"model": "sql"}) for _ in range(40)]
        counted = Counter(answer.headers["x-tuneship-version"] for answer in answers)
        assert set(counted) == {VERSION, canary.name}
        assert 4 <= counted[canary.name] <= 16
        sent = Counter(body["lora_path"] for body in engine[0].bodies)
        assert sent == {SELECTOR: counted[VERSION], canary.selector: counted[canary.name]}


async def test_while_the_engine_starts_nobody_is_told_what_exists(engine):
    async for door in open_door(engine[1], ready=False):
        for name in ("sql", "nobody"):
            response = await door.post(CHAT, json={"model": name, "messages": []})
            assert response.status == 503
            assert response.headers["Retry-After"]
        assert (await door.get("/ready")).status == 503
        assert (await door.get("/health")).status == 200
    assert not engine[0].bodies


async def test_an_engine_that_is_not_there():
    async for door in open_door(f"http://127.0.0.1:{free_port()}"):
        response = await door.post(CHAT, json={"model": "sql", "messages": []})
        assert response.status == 503
        assert (await error_of(response))["code"] == "engine_unavailable"
        assert response.headers["x-tuneship-version"] == VERSION


async def test_an_engine_that_dies_before_it_answers(door, engine):
    async def die(request: web.Request) -> web.StreamResponse:
        request.transport.abort()
        return web.Response()

    engine[0].script = die
    response = await door.post(CHAT, json={"model": "sql", "messages": []})
    assert response.status == 503
    assert (await error_of(response))["code"] == "engine_unavailable"


@pytest.mark.parametrize(
    ("status", "body", "expected", "message"),
    [
        (400, {"object": "error", "message": "max_tokens must be positive"}, 400, "max_tokens must be positive"),
        (400, {"error": {"message": "nested"}}, 400, "nested"),
        (400, {"message": "[03:14:58] /project/cpp/x.cc:29: No type"}, 400, "... No type"),
        (400, {"message": "x" * 5000}, 400, "x" * 1000),
        (400, {"message": 'bad\n\n  File "/a/b.py", line 3, in f\n    POST /v1/x'}, 400, "bad..."),
        (422, ["odd"], 422, "The inference engine refused this request."),
        (500, {"message": "/secret/path is missing"}, 502, "The inference engine failed on this request."),
        (503, {}, 503, "The inference engine is not available."),
    ],
)
async def test_the_engines_errors_in_openais_form(door, engine, status, body, expected, message):
    async def refuse(_: web.Request) -> web.StreamResponse:
        return web.json_response(body, status=status)

    engine[0].script = refuse
    response = await door.post(CHAT, json={"model": "sql", "messages": []})
    assert response.status == expected
    assert (await error_of(response))["message"] == message
    assert response.headers["x-tuneship-version"] == VERSION


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_ends_the_engines_work(door, engine, stream):
    scripted = engine[0]

    async def stream_for_ever(request: web.Request) -> web.StreamResponse:
        try:
            return await scripted.stream(request, (EVENTS[0] for _ in range(6000)))
        finally:
            scripted.left.set()

    scripted.script = stream_for_ever if stream else scripted.hang
    asking = asyncio.ensure_future(door.post(CHAT, json={"model": "sql", "stream": stream}))
    await scripted.asked.wait()
    if stream:
        (await asking).close()
    else:
        asking.cancel()
    await asyncio.wait_for(scripted.left.wait(), timeout=5)


PAGE = b'# TYPE sglang:generation_tokens_total counter\nsglang:generation_tokens_total{model_name="b"} 7.0\n'


async def test_the_engines_metrics_stand_behind_the_doors_as_they_are(door, engine):
    await (await door.post(CHAT, json={"model": "sql"})).read()

    async def page(request: web.Request) -> web.StreamResponse:
        response = web.Response(body=PAGE, headers={"Content-Type": CONTENT_TYPE})
        response.enable_compression()  # as the client asks for it, as SGLang's page is
        assert request.headers["Accept"] == "text/plain"
        return response

    engine[0].script = page
    response = await door.get("/metrics", headers={"Accept": "application/openmetrics-text"})
    assert response.status == 200
    assert response.headers["Content-Type"] == CONTENT_TYPE
    ours, theirs = (await response.read()).split(PAGE)
    assert f'tuneship_requests_total{{alias="sql",code="200",version="{VERSION}"}} 1.0'.encode() in ours
    assert theirs == b""
    assert (await door.post("/metrics")).status == 405


@pytest.mark.parametrize("status", [404, 500, 503])
async def test_an_engine_without_metrics_leaves_the_doors(door, engine, status):
    async def refuse(_: web.Request) -> web.StreamResponse:
        return web.Response(status=status, text="/secret/path")

    engine[0].script = refuse
    response = await door.get("/metrics")
    assert response.status == 200
    page = await response.text()
    assert "tuneship_engine_up" in page
    assert "/secret" not in page


async def test_metrics_without_an_engine():
    async for door in open_door(f"http://127.0.0.1:{free_port()}"):
        assert "tuneship_engine_up" in await (await door.get("/metrics")).text()


async def test_health(door):
    assert (await door.get("/health")).status == 200
    assert (await door.get("/ready")).status == 200
