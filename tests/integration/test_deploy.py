"""A server through its life: adapters come, get weight, go; the engine is killed and hangs; all of it is killed.

One server for the whole module, told what to do by the verbs that a user has. The tests stand in the order of its life.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import aiohttp
import pytest

from tuneship.core.endpoint import VERSION_HEADER

pytestmark = pytest.mark.integration

CHAT = "/v1/chat/completions"
BASE = "tiny-llama"
HANG_S = 4


@pytest.fixture(scope="module")
def others(tiny_model: Path, marker_adapter) -> dict[str, Path]:
    """{marker: adapter} of versions that the server does not begin with."""
    return {marker: marker_adapter(tiny_model, marker.strip("<>"), marker) for marker in ("<alpha2>", "<delta>")}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server and the verbs keep what they know of each other."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module", autouse=True)
def _own_cache(home: Path):
    before = os.environ.get("TUNESHIP_CACHE")
    os.environ["TUNESHIP_CACHE"] = str(home / "cache")
    yield
    if before is None:
        del os.environ["TUNESHIP_CACHE"]
    else:
        os.environ["TUNESHIP_CACHE"] = before


@pytest.fixture(scope="module")
def start(start_module_server, tiny_model: Path, marker_adapters: Path, home: Path):
    """Start the server; a second time it finds what the first one left. Two slots for three adapters and more."""

    def start():
        words = ("--max-loras", "2", "--max-rank", "8", "--hang-timeout", str(HANG_S), "--drain", "10")
        state = ("--state", str(home / "state"))
        server = start_module_server(
            str(tiny_model), "--adapters", str(marker_adapters), "--dtype", "float32", *words, *state
        )
        server.wait_ready()
        return server

    return start


@pytest.fixture(scope="module")
def server(start):
    return start()


@pytest.fixture(scope="module")
def url(server) -> str:
    return server.endpoint.url


def verb(*words: object, code: int = 0) -> str:
    """What `tuneship adapters` prints, on stdout where it went well, else on stderr."""
    argv = [sys.executable, "-m", "tuneship", "adapters", *map(str, words)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if code == 0 else done.stderr


def states(alias: str) -> dict[str, tuple[str, str]]:
    """{version: (state, weight)} of an alias, as `adapters list` says."""
    rows = (line.split() for line in verb("list").splitlines()[1:])
    return {row[0]: (row[1].rstrip(","), row[2]) for row in rows if row[0].startswith(f"{alias}@")}


async def heard(url: str, model: str, markers: dict[str, str], count: int = 1) -> Counter[str]:
    """{marker: how often} in `count` answers of `model`; "" is an answer without any. No version has two of them."""
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 10, "temperature": 0}
    found: Counter[str] = Counter()
    voices: dict[str, str] = {}
    async with aiohttp.ClientSession(url) as session:
        for _ in range(count):
            async with session.post(CHAT, json=body) as response:
                answer = await response.json()
                assert response.status == 200, answer
            text = answer["choices"][0]["message"]["content"] or ""
            said = next((marker for marker in markers.values() if text.startswith(marker)), "")
            found[said] += 1
            assert voices.setdefault(response.headers[VERSION_HEADER], said) == said
    assert len(set(voices.values())) == len(voices), f"two versions say the same: {voices}"
    return found


@pytest.fixture(scope="module")
def voices(markers, others) -> dict[str, str]:
    """Every marker there is; longer ones first, for one begins like another."""
    every = sorted([*markers.values(), *others], key=len, reverse=True)
    return {marker: marker for marker in every}


async def test_more_adapters_than_slots_all_answer(url, markers, voices):
    for _ in range(2):
        for name, marker in markers.items():
            assert await heard(url, name, voices) == {marker: 1}
    async with aiohttp.ClientSession(url) as session, session.get("/metrics") as answer:
        page = await answer.text()
    misses = next(line for line in page.splitlines() if line.startswith("tuneship_adapter_slot_misses_per_minute"))
    assert float(misses.split()[1]) >= 3, "two of three adapters fit"


async def test_a_canary_is_promoted_and_rolled_back(url, voices, others):
    first = next(iter(states("alpha")))
    verb("load", others["<alpha2>"], "--alias", "alpha", "--weight", "40%")
    (second,) = set(states("alpha")) - {first}
    assert states("alpha") == {first: ("live", "60%"), second: ("canary", "40%")}
    found = await heard(url, "alpha", voices, 40)
    assert set(found) == {"<alpha>", "<alpha2>"}
    assert 6 <= found["<alpha2>"] <= 28

    verb("promote", "alpha")
    assert await heard(url, "alpha", voices, 5) == {"<alpha2>": 5}
    assert await heard(url, first, voices) == {"<alpha>": 1}, "what was live answers to its own name"
    verb("rollback", "alpha")
    assert await heard(url, "alpha", voices, 5) == {"<alpha>": 5}
    assert await heard(url, second, voices) == {"<alpha2>": 1}
    said = verb("history", "alpha")
    assert [line.split()[1] for line in said.splitlines()[1:6]] == ["rollback", "promote", "weigh", "loaded", "add"]


async def test_what_was_unloaded_never_answers_again(server, url):
    """SGLang alone brings it back: asked by name, it loads an adapter from where it once was."""
    (second,) = [name for name, (state, _) in states("alpha").items() if state == "loaded"]
    assert "is live" in verb("unload", next(n for n, (s, _) in states("alpha").items() if s == "live"), code=1)
    verb("unload", second)
    assert second not in states("alpha")
    engine = json.loads((server.folder / "endpoint.json").read_text())["engine"]["flags"]
    body = {"model": second, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    async with aiohttp.ClientSession(url) as session, session.post(CHAT, json=body) as response:
        assert response.status == 404
    behind = f"http://127.0.0.1:{engine[engine.index('--port') + 1]}"
    async with (
        aiohttp.ClientSession(behind) as session,
        session.post(CHAT, json={**body, "model": BASE, "lora_path": f"{second}#1"}) as response,
    ):
        assert response.status != 200, "the engine still has it"


async def _goes_away(session: aiohttp.ClientSession, body: dict) -> None:
    """Hang up after the first token."""
    async with session.post(CHAT, json=body | {"stream": True, "max_tokens": 500, "ignore_eos": True}) as response:
        async for line in response.content:
            if line.startswith(b"data: "):
                return


async def _goes_away_in_the_queue(session: aiohttp.ClientSession, body: dict) -> None:
    """More at once than the engine runs on a CPU (16); all hang up."""
    asked = [asyncio.create_task(_goes_away(session, body)) for _ in range(24)]
    await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
    for task in asked:
        task.cancel()
    await asyncio.gather(*asked, return_exceptions=True)


async def _asks_too_much(session: aiohttp.ClientSession, body: dict) -> None:
    too_long = [{"role": "user", "content": "word " * 5000}]
    async with session.post(CHAT, json=body | {"messages": too_long}) as response:
        assert response.status == 400


async def _wants_three(session: aiohttp.ClientSession, body: dict) -> None:
    async with session.post(CHAT, json=body | {"n": 3, "max_tokens": 4}) as response:
        assert len((await response.json())["choices"]) == 3


@pytest.mark.parametrize("misuse", [_goes_away, _goes_away_in_the_queue, _asks_too_much, _wants_three])
async def test_a_request_that_ends_badly_keeps_no_adapter(url, others, misuse):
    """SGLang alone counts it as in flight for ever: the unload waits for it, and every load after that."""
    verb("load", others["<delta>"], "--alias", "delta")
    body = {"model": "delta", "messages": [{"role": "user", "content": "hello"}]}
    async with aiohttp.ClientSession(url) as session:
        await misuse(session, body)
    verb("unload", "delta")
    assert not states("delta")


async def test_an_adapter_that_cannot_be_served_changes_nothing(tmp_path, marker_adapters):
    before = verb("list")
    broken = tmp_path / "wide"
    shutil.copytree(marker_adapters / "alpha", broken)
    settings = json.loads((broken / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps(settings | {"r": 64}))
    said = verb("load", broken, "--alias", "alpha", code=1)
    assert "has rank 64, the server takes at most 8" in said
    assert "restart with --max-rank 64" in said
    assert "the base is called tiny-llama" in verb("load", marker_adapters / "beta", "--alias", BASE, code=1)
    assert "no adapter_config.json" in verb("load", tmp_path, code=1)
    assert verb("list") == before


async def test_an_answer_keeps_its_version_and_an_unload_that_waits_stops_nobody(url, others, voices):
    verb("load", others["<delta>"], "--alias", "delta")
    body = {"model": "delta", "prompt": "a", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    async with aiohttp.ClientSession(url) as session, session.post("/v1/completions", json=body) as response:
        version = response.headers["x-tuneship-version"]
        await response.content.readany()
        said = await asyncio.to_thread(verb, "unload", "delta", "--timeout", "1", code=1)
        assert "1 requests in flight after 1 s: it answers nobody new" in said
        async with session.post("/v1/completions", json={**body, "stream": False}) as refused:
            assert refused.status == 404
        # Meanwhile other adapters come and go.
        await asyncio.to_thread(verb, "load", others["<alpha2>"], "--alias", "beta", "--weight", "100%")
        assert await heard(url, "beta", voices) == {"<alpha2>": 1}
        await asyncio.to_thread(verb, "rollback", "beta")
        await asyncio.to_thread(verb, "unload", next(n for n, (s, _) in states("beta").items() if s == "loaded"))
        rest = await response.read()
    assert rest.endswith(b"data: [DONE]\n\n"), "it was finished by the version that began it"
    await _until(lambda: version not in states("delta"))


async def _until(condition, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.2)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hangs"])
async def test_an_engine_that_fails_comes_back_with_its_adapters(server, url, markers, voices, others, how):
    if how is signal.SIGKILL:
        verb("load", others["<alpha2>"], "--alias", "alpha", "--weight", "40%")
    before = verb("list")
    body = {"model": "alpha", "prompt": "a", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    async with aiohttp.ClientSession(url) as session:
        async with session.post("/v1/completions", json=body) as response:
            await response.content.readany()
            victim = next(
                process for process in server.family() if process.is_running() and _is(process, "sglang::scheduler")
            )
            victim.send_signal(how)
            *_, last, rest = (await response.read()).split(b"\n\n")
        assert rest == b""
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "engine_unavailable"
        async with session.post("/v1/completions", json={**body, "model": "beta"}) as refused:
            assert refused.status == 503
            assert int(refused.headers["Retry-After"]) > 0
            assert (await refused.json())["error"]["code"] == "engine_unavailable"
        assert await _status(session, "/health") == 200
        assert await _status(session, "/ready") == 503
        deadline = time.monotonic() + 120
        while await _status(session, "/ready") != 200:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.2)
    assert verb("list") == before
    for name in ("beta", "gamma"):
        assert await heard(url, name, voices) == {markers[name]: 1}
    assert set(await heard(url, "alpha", voices, 40)) == {"<alpha>", "<alpha2>"}
    assert "starting it again" in server.said


async def _status(session: aiohttp.ClientSession, path: str) -> int:
    async with session.get(path) as answer:
        return answer.status


def _is(process, name: str) -> bool:
    return name in " ".join(process.cmdline())


async def test_a_server_that_was_killed_comes_back_as_it_was(server, start, voices):
    verb("unload", "gamma")
    before = verb("list")
    server.signal(signal.SIGKILL)
    assert server.exit_code() == -signal.SIGKILL
    server.assert_no_orphans(within_s=8)
    again = start()
    assert verb("list") == before
    assert "gamma@" in again.said, "it says why what lies in --adapters does not answer"
    assert "was unloaded and stays so" in again.said
    assert set(await heard(again.endpoint.url, "alpha", voices, 20)) == {"<alpha>", "<alpha2>"}
    again.signal(signal.SIGTERM)
    assert again.exit_code() == 0
    assert "no server is running" in verb("list", code=1)
