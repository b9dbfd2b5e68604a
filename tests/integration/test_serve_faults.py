"""Whatever is killed, whenever: one clear error, every client told, nobody left behind."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from pathlib import Path

import aiohttp
import pytest

pytestmark = pytest.mark.integration

LONG = {"model": "tiny-llama", "prompt": "a", "max_tokens": 1800, "ignore_eos": True}


def start(start_server, tiny_model: Path, *words: str):
    server = start_server(str(tiny_model), "--dtype", "float32", *words)
    return server, server.wait_ready()


def shared(server) -> Path:
    """What its scheduler keeps in shared memory, which SGLang would leave there."""
    held = (Path(file.path) for file in server.engine("sglang::scheduler").open_files())
    (found,) = {path for path in held if path.name.startswith("sglang_loads_")}
    return found


class LongRequest:
    """A request that is still being answered when something happens; keeps what came."""

    def __init__(self, url: str, *, stream: bool) -> None:
        self.began = asyncio.Event()
        self.status = 0
        self.body = b""
        self.done = asyncio.ensure_future(self._run(f"{url}/v1/completions", {**LONG, "stream": stream}))

    async def _run(self, url: str, body: dict) -> None:
        async with aiohttp.ClientSession() as session, session.post(url, json=body) as response:
            self.status = response.status
            async for chunk in response.content.iter_any():
                self.body += chunk
                self.began.set()

    async def last_event(self) -> dict:
        await asyncio.wait_for(self.done, timeout=60)
        *_, last, rest = self.body.split(b"\n\n")
        assert rest == b""
        return json.loads(last.removeprefix(b"data: "))


@pytest.mark.parametrize(
    ("victim", "reason"),
    [
        ("sglang::scheduler", "scheduler"),
        pytest.param("sglang.launch_server", "it ended with SIGKILL", marks=pytest.mark.slow),
    ],
)
async def test_kill_9_of_an_engine_that_is_not_to_be_started_again(start_server, tiny_model, victim, reason):
    server, url = start(start_server, tiny_model, "--restarts", "0")
    stream, whole = LongRequest(url, stream=True), LongRequest(url, stream=False)
    await asyncio.wait_for(stream.began.wait(), timeout=60)
    loads = shared(server)
    server.engine(victim).kill()

    assert (await stream.last_event())["error"]["code"] == "engine_unavailable"
    await asyncio.wait_for(whole.done, timeout=60)
    assert whole.status == 503
    assert json.loads(whole.body)["error"]["code"] == "engine_unavailable"
    assert server.exit_code() == 1
    assert server.said.count("error:") == 1
    (told,) = [line for line in server.said.splitlines() if "SGLang died while serving: " in line]
    assert reason in told
    assert "hint:" in server.said
    assert "Traceback" not in server.said
    assert not server.endpoint_file.exists()
    server.assert_no_orphans()
    assert not loads.exists()


async def test_ctrl_c_while_serving(start_server, tiny_model):
    server, url = start(start_server, tiny_model)
    stream = LongRequest(url, stream=True)
    await asyncio.wait_for(stream.began.wait(), timeout=60)
    loads = shared(server)
    server.signal(signal.SIGINT)
    await asyncio.sleep(0.5)
    with pytest.raises(aiohttp.ClientConnectorError):
        await LongRequest(url, stream=False).done
    server.signal(signal.SIGINT)  # do not wait for 1800 tokens
    assert (await stream.last_event())["error"]["code"] == "engine_unavailable"
    assert server.exit_code() == 130
    assert "Traceback" not in server.said
    server.assert_no_orphans()
    assert not loads.exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGKILL, -9)])
def test_stopped_while_starting(start_server, tiny_model, number, code):
    server = start_server(str(tiny_model))
    server.wait_for(lambda: "starting SGLang" in server.said and server.family())
    time.sleep(3)
    server.signal(number)
    assert server.exit_code() == code
    assert not server.endpoint_file.exists()
    assert "Traceback" not in server.said
    server.assert_no_orphans()


def test_a_flag_that_sglang_does_not_know(start_server, tiny_model):
    server = start_server(str(tiny_model), "--extra-arg=--no-such-flag")
    assert server.exit_code(timeout_s=120) == 1
    assert "SGLang did not start: unrecognized arguments: --no-such-flag" in server.said
    assert "engine.log" in server.said
