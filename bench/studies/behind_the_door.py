"""What a study asks the engine itself, which no client of the door can.

    url = engine_url(process.pid)      # of a running `tuneship serve`
    allocated_gib(url)["weight"]

SGLang listens on loopback, at a port that it was given at random.
"""

from __future__ import annotations

from typing import Any

import httpx

from tuneship.core.process import descendants


def engine_url(pid: int) -> str:
    """Where the engine of the server `pid` listens.

    Raises:
        RuntimeError: it has none.

    """
    for child in descendants(pid):
        words = child.cmdline()
        if "sglang.launch_server" in words:
            return f"http://127.0.0.1:{words[words.index('--port') + 1]}"
    raise RuntimeError("the server has no engine")


def allocated_gib(url: str) -> dict[str, Any]:
    """What SGLang says that it allocated, by what for, and for how many tokens; empty where it says nothing."""
    said = httpx.get(f"{url}/server_info", timeout=30).json()
    return (said.get("internal_states") or [{}])[0].get("memory_usage") or {}
