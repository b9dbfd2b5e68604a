"""What ends a real engine while it serves, but a kill: no memory left, and a route of its own that nobody may reach.

The server says why, answers nothing as the base meanwhile, starts it again, and every adapter answers as before.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from pathlib import Path

import aiohttp
import psutil
import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

STREAM = {"model": "alpha", "prompt": "a", "max_tokens": 1500, "ignore_eos": True, "stream": True}
LONG = {"model": "beta", "prompt": [7] * 1800, "max_tokens": 2}
NAMES = ("alpha", "beta", "gamma")


@pytest.fixture(scope="module")
def server(start_module_server, tiny_model: Path, marker_adapters: Path):
    server = start_module_server(str(tiny_model), "--adapters", str(marker_adapters), "--dtype", "float32")
    server.wait_ready()
    return server


def process(server, name: str) -> psutil.Process:
    """The engine's process of that name which runs now."""
    (found,) = [p for p in server.family() if p.is_running() and name in " ".join(p.cmdline())]
    return found


async def status(session: aiohttp.ClientSession, path: str) -> int:
    async with session.get(path) as answer:
        return answer.status


async def no_memory(server, session: aiohttp.ClientSession) -> None:
    """The scheduler may take no more than it has, and a prompt comes for which it needs some."""
    scheduler = process(server, "sglang::scheduler")
    held = scheduler.memory_info().vms
    scheduler.rlimit(psutil.RLIMIT_AS, (held, scheduler.rlimit(psutil.RLIMIT_AS)[1]))
    async with session.post("/v1/completions", json=LONG) as response:
        assert response.status == 503
        assert int(response.headers["Retry-After"]) > 0
        assert (await response.json())["error"]["code"] == "engine_unavailable"


async def broken_tensors(server, _: aiohttp.ClientSession) -> None:
    """Why the door has none of the engine's routes. When this ends nothing, upstream has mended it."""
    port = re.search(r"--port (\d+)", " ".join(process(server, "sglang.launch_server").cmdline()))
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    body = {"lora_name": "x", "config_dict": config, "serialized_named_tensors": ["AAAA"]}
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port[1]}") as engine:
        try:
            timeout = aiohttp.ClientTimeout(20)
            async with engine.post("/load_lora_adapter_from_tensors", json=body, timeout=timeout) as answer:
                await answer.read()
        except (aiohttp.ClientError, TimeoutError):
            return


@pytest.mark.parametrize(
    ("ends", "reason"), [(no_memory, r"can't allocate memory|MemoryError"), (broken_tensors, "UnpicklingError")]
)
async def test_it_is_started_again_and_says_why(server, ends, reason: str):
    before = server.said
    async with aiohttp.ClientSession(server.endpoint.url) as session:
        async with session.post("/v1/completions", json=STREAM) as response:
            await response.content.readany()
            await ends(server, session)
            *_, last, rest = (await response.read()).split(b"\n\n")
        assert rest == b""
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "engine_unavailable"
        began = time.monotonic()
        while await status(session, "/ready") != 200:
            assert time.monotonic() - began < 120
            await asyncio.sleep(0.2)
        said = server.said.removeprefix(before)
        (told,) = [line for line in said.splitlines() if "SGLang died while serving: " in line]
        assert re.search(reason, told)
        assert "starting it again" in told
        for name in NAMES:
            async with session.post("/v1/completions", json={**LONG, "model": name, "prompt": "a"}) as answer:
                assert answer.status == 200
                assert answer.headers["x-tuneship-version"].startswith(f"{name}@")


async def test_the_engine_still_hands_out_its_keys_and_settings(server):
    """When this fails, upstream has mended it."""
    port = re.search(r"--port (\d+)", " ".join(process(server, "sglang.launch_server").cmdline()))
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port[1]}") as engine, engine.get("/server_info") as answer:
        info = await answer.json()
    assert info.keys() >= {"api_key", "admin_api_key", "model_path"}
    async with aiohttp.ClientSession(server.endpoint.url) as door:
        assert await status(door, "/server_info") == 404
