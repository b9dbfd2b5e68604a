"""Where a scripted engine (`conftest.ScriptedEngine`) is asked, and how a test waits for that."""

from __future__ import annotations

import asyncio
from typing import Any

LOAD, UNLOAD, GENERATE = "/load_lora_adapter", "/unload_lora_adapter", "/generate"


async def until(done: Any) -> None:
    async with asyncio.timeout(5):
        while not done():  # noqa: ASYNC110 - it is another's state
            await asyncio.sleep(0.01)
