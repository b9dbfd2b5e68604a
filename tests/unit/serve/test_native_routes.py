"""SGLang's own routes, all of them: none leads through the door.

`/server_info` hands out keys, `/load_lora_adapter_from_tensors` ends the engine, `/update_weights_from_disk` changes
who answers, `/generate` asks past the names. The list is the installed SGLang's own, so a new one is in it too.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web

from tests.unit.serve.listening import answering
from tests.unit.serve.sglang_routes import NativeRoute, native_routes
from tests.unit.serve.test_gateway import error_of, open_door

ROUTES = native_routes()
OURS = {
    *(NativeRoute("GET", path) for path in ("/v1/models", "/v1/models/x", "/health")),
    *(NativeRoute("POST", f"/v1/{name}") for name in ("completions", "chat/completions", "tokenize")),
}
"""Which the door answers too: the first three by itself, the others by name, from its table."""
OTHERS = [route for route in ROUTES if route not in OURS]
NOT_FOUND = (404, "unknown_url")


@pytest.fixture
async def engine() -> AsyncIterator[tuple[list[str], str]]:
    """What it was asked, and where it is: it takes anything."""
    asked: list[str] = []

    async def take(request: web.Request) -> web.Response:
        asked.append(f"{request.method} {request.path}")
        return web.json_response({"api_key": "a-secret"})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", take)
    async with answering(app) as url:
        yield asked, url


@pytest.fixture
async def door(engine) -> AsyncIterator[aiohttp.ClientSession]:
    async for session in open_door(engine[1]):
        yield session


def test_the_list_is_sglangs():
    found = {route.path for route in ROUTES}
    assert found >= {"/server_info", "/get_server_info", "/load_lora_adapter_from_tensors", "/load_lora_adapter"}
    assert found >= {"/unload_lora_adapter", "/update_weights_from_disk", "/generate", "/flush_cache", "/v1/realtime"}
    assert len(found) > 80
    assert set(ROUTES) >= OURS, "the door has a route that SGLang has no more"


async def test_none_of_sglangs_own_is_found(door, engine):
    """All of them at one door: each has a name, a method, and an answer in the right form."""
    assert {route: await answer(door, route) for route in OTHERS} == dict.fromkeys(OTHERS, NOT_FOUND)
    assert engine[0] == []


async def test_no_websocket_is_opened(door, engine):
    (route,) = (route for route in ROUTES if route.method == "WEBSOCKET")
    with pytest.raises(aiohttp.WSServerHandshakeError):
        await door.ws_connect(route.path)
    assert engine[0] == []


SPELLINGS = (
    *("//server_info", "/server_info/", "/%73erver_info", "/./server_info", "/v1/../server_info", "/SERVER_INFO"),
    *("/v1/%2e%2e/server_info", "/v1/models/../../server_info", "/v1//server_info", "/server_info?model=sql"),
    *("/;/server_info", "http://127.0.0.1/server_info", "/v1/completions/../../generate", "/health/../server_info"),
    *("/metrics/../server_info", "/v1/chat/completions/../../../server_info"),
)


async def test_nor_by_another_spelling(door, engine):
    """Bytes as they are: a client library would tidy them up."""
    for method in ("GET", "POST"):
        for path in SPELLINGS:
            status, said = await raw(str(door._base_url), method, path)
            assert status in {400, 404, 405}, path
            assert b"a-secret" not in said, path
    assert engine[0] == []


async def answer(door: aiohttp.ClientSession, route: NativeRoute) -> tuple[int, str]:
    method = "GET" if route.method == "WEBSOCKET" else route.method
    body = None if method in {"GET", "HEAD"} else {"model": "sql", "lora_name": "x", "text": "a", "messages": []}
    response = await door.request(method, route.path, json=body)
    return response.status, "unknown_url" if method == "HEAD" else (await error_of(response))["code"]


async def raw(url: str, method: str, path: str) -> tuple[int, bytes]:
    host, port = url.removeprefix("http://").rstrip("/").rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
    said = await reader.read()
    writer.close()
    return int(said.split(b" ", 2)[1]), said
