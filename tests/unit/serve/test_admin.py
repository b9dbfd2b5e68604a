"""The admin side on a real port: who may, what it refuses, and the verbs of the command line against it."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.unit.serve.listening import listening
from tuneship.core.errors import EndpointError, EngineError, ParityError, PreflightError, RecipeError, RegistryError
from tuneship.serve import adapters_commands as verbs
from tuneship.serve import deploy
from tuneship.serve.admin import build_admin
from tuneship.serve.assembly import Parts
from tuneship.serve.metrics import Live
from tuneship.serve.running import Running, announced
from tuneship.serve.supervisor import Phase
from tuneship.serve.upstream import Upstream

KEY = "the-admin-key"


@pytest.fixture
async def admin(world) -> AsyncIterator[str]:
    parts = Parts(
        world.routes,
        world.metrics,
        world.deployer._engine.upstream,
        world.supervisor,
        Live,
        world.deployer,
        world.registry,
    )
    async for url in served(parts, "adapters"):
        yield url


async def served(parts: Parts, mode: str) -> AsyncIterator[str]:
    """`parts`' admin side, announced as this process's server; its address."""
    async with listening(build_admin(parts, lambda token: "local" if token == KEY else None, mode)) as (url, _):
        with announced(Running(url="http://127.0.0.1:1", admin_url=url, admin_key=KEY)):
            yield url


@pytest.fixture
async def ask(admin) -> AsyncIterator[Any]:
    """(method, path, key, **request) -> (status, JSON)."""
    async with aiohttp.ClientSession(admin) as session:

        async def asked(method: str, path: str, key: str = KEY, **request: Any) -> tuple[int, Any]:
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            async with session.request(method, path, headers=headers, **request) as answer:
                return answer.status, await answer.json()

        yield asked


@pytest.mark.parametrize("key", ["", "wrong", "the-admin-key2"])
async def test_without_the_key_nothing_is_told_or_done(ask, key):
    for method, path in (
        ("GET", "/admin/status"),
        ("GET", "/admin/adapters"),
        ("GET", "/admin/history"),
        ("POST", "/admin/adapters"),
        ("POST", "/admin/adapters/sql/promote"),
        ("POST", "/admin/adapters/sql/weight"),
        ("POST", "/admin/adapters/sql/rollback"),
        ("POST", "/admin/adapters/sql/unload"),
    ):
        status, said = await ask(method, path, key, data=b"{")
        assert (status, said["error"]["type"]) == (401, "EndpointError")
        assert KEY not in str(said)


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/admin/adapters", b"{", 400, "JSON"),
        ("/admin/adapters", b"", 400, "path: Field required"),
        ("/admin/adapters", b'{"path": 1}', 400, "path"),
        ("/admin/adapters", b'{"path": "x", "wieght": 1}', 400, "wieght"),
        ("/admin/adapters", b'{"path": "x", "weight": 2}', 400, "weight"),
        ("/admin/adapters", b" " * (1 << 20) + b"{}", 413, "too large"),
        ("/admin/adapters/sql/weight", b'{"weight": NaN}', 400, "weight"),
        ("/admin/adapters/sql/unload", b'{"timeout_s": 0}', 400, "timeout_s"),
        ("/admin/adapters/sql/none", b"", 404, "Not Found"),
    ],
)
async def test_a_bad_body_is_refused(ask, path, body, status, message):
    got, said = await ask("POST", path, data=io.BytesIO(body))
    assert got == status
    assert message in said["error"]["message"]


@pytest.mark.parametrize("limit", ["0", "-1", "x", "10001", "9" * 5000])
async def test_a_history_without_measure_is_refused(ask, limit):
    status, said = await ask("GET", f"/admin/history?limit={limit}")
    assert (status, said["error"]["type"]) == (400, "EndpointError")


async def test_an_engine_that_is_not_there_is_503(ask, world, adapters, monkeypatch):
    monkeypatch.setattr(deploy, "_READY_S", 0.05)
    world.phase(Phase.RESTARTING)
    status, said = await ask("POST", "/admin/adapters", json={"path": str(adapters[0])})
    assert (status, said["error"]["type"], said["error"]["hint"]) == (
        503,
        "EngineError",
        "try again when /ready says so",
    )
    assert (await ask("GET", "/admin/status"))[1]["engine"]["state"] == "restarting"


async def test_every_verb_of_the_command_line(admin, world, adapters, capsys):
    async def did(verb: Any, *given: Any, **named: Any) -> str:
        await asyncio.to_thread(verb, *given, **named)
        return capsys.readouterr().out

    assert "live, pinned" in await did(verbs.load, adapters[0], alias="sql", pin=True)
    assert "5%" in await did(verbs.load, adapters[1], alias="sql", weight="5%")
    assert "25%" in await did(verbs.weigh, "sql", "0.25")
    assert "100%" in await did(verbs.promote, "sql")
    assert "live" in await did(verbs.rollback, "sql", url=admin)
    assert len((await did(verbs.list_)).splitlines()) == 3
    assert (await did(verbs.unload, "sql", timeout=5)).count("unloaded") == 2
    assert len((await did(verbs.list_)).splitlines()) == 1
    told = await did(verbs.history, "sql", limit=3)
    assert len(told.splitlines()) == 4
    assert "local" in told
    world.agree()


async def test_errors_come_out_as_their_own_kind(admin, world, adapters):
    async def fails(kind: type[Exception], verb: Any, *given: Any, **named: Any) -> Any:
        with pytest.raises(kind) as caught:
            await asyncio.to_thread(verb, *given, **named)
        assert type(caught.value) is kind
        assert KEY not in str(caught.value)
        return caught.value

    error = await fails(RegistryError, verbs.promote, "sql")
    assert (error.message, error.hint) == ("there is no sql here", "loaded: nothing")
    world.verdict = ParityError("another model", hint="train it again")
    assert (await fails(ParityError, verbs.load, adapters[0])).hint == "train it again"
    world.engine.faults["/load_lora_adapter"] = 400
    await fails(PreflightError, verbs.load, adapters[0])
    world.engine.faults["/load_lora_adapter"] = 500
    await fails(EngineError, verbs.load, adapters[0])
    await fails(RecipeError, verbs.weigh, "sql", "150%")
    await fails(RecipeError, verbs.weigh, "sql", "nan")


async def test_a_refused_load_stands_in_the_servers_log_in_one_line(ask, make_adapter, capsys):
    odd = make_adapter("odd", config={"use_dora": True, "bias": "all"})
    status, said = await ask("POST", "/admin/adapters", json={"path": str(odd)})
    assert status == 409
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "odd" in line]
    assert line.startswith(f"warning: {odd} was not loaded: adapter 'odd' cannot be served, for 2 reasons")
    assert "SGLang has no DoRA" in line
    assert said["error"]["hint"].splitlines()[0] in line
    await ask("POST", "/admin/adapters", json={"path": "/no\x1b[31mwhere\nwarning: all is well"})
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert "\x1b" not in line


async def test_an_older_server_says_nothing_of_what_came_later(monkeypatch, capsys):
    version = {"version": "sql@1", "state": "live", "pinned": False, "weight": 1.0, "verified": "passed"}
    monkeypatch.setattr(verbs, "_ask", lambda *_: version | {"in_flight": 0})
    verbs.load(Path("x"))
    assert "sql@1" in capsys.readouterr().out


@pytest.mark.parametrize("given", [{"url": "http://127.0.0.1:1"}, {"timeout": 5.0}, {"timeout": 60.0}], ids=str)
def test_what_is_about_a_server_is_not_ignored_where_none_runs(tmp_path, given):
    (option,) = given
    with pytest.raises(RecipeError, match=f"--{option} is about a server that runs"):
        verbs.unload("sql", state=tmp_path, **given)


@pytest.mark.parametrize("name", ["sql@0123456789ab#1", "sql?x=", "sql?", "sql#"])
async def test_a_name_stays_a_name_in_the_address(admin, world, adapters, name):
    await world.deployer.load(adapters[0], alias="sql")
    with pytest.raises(RegistryError, match="there is no "):
        await asyncio.to_thread(verbs.unload, name)
    world.agree()


async def test_a_server_of_one_model_has_no_adapter_verbs(world):
    async with Upstream() as upstream:
        parts = Parts(world.routes, world.metrics, upstream, world.supervisor, Live)
        async for _ in served(parts, "merged"):
            with pytest.raises(PreflightError, match=r"one model \(merged\)"):
                await asyncio.to_thread(verbs.load, Path("x"))


async def test_who_is_no_admin_side_is_told_apart(world, monkeypatch):
    monkeypatch.setenv("TUNESHIP_ADMIN_KEY", KEY)

    async def door(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = b'{"error": {"message": "no such page", "code": "not_found"}}'
        writer.write(b"HTTP/1.1 404 Not Found\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(door, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with pytest.raises(EndpointError, match="does not answer as a server's admin side"):
            await asyncio.to_thread(verbs.list_, url=url)
    with pytest.raises(EndpointError, match="does not answer"):
        await asyncio.to_thread(verbs.list_, url=url)


async def test_what_is_good_to_know_of_a_load_is_answered_and_kept(ask, make_adapter, capsys):
    path = make_adapter("sql", config={"base_model_name_or_path": "/models/another"})
    status, answer = await ask("POST", "/admin/adapters", json={"path": str(path), "alias": "sql"})
    assert status == 200
    (remark,) = answer["remarks"]
    assert "/models/another" in remark
    assert f"warning: {remark}" in capsys.readouterr().err
    _, history = await ask("GET", "/admin/history")
    assert [event["detail"] for event in history if event["verb"] == "loaded"] == [f"passed; {remark}"]
    await asyncio.to_thread(verbs.load, make_adapter("csv", config={"base_model_name_or_path": "/models/another"}))
    assert capsys.readouterr().err.count("warning: adapter 'csv'") == 2, "the server's, and the verb's"
