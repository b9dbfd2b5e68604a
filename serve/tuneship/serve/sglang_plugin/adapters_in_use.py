"""An adapter is in use while a request of it is computed, and no longer.

Upstream gap: SGLang counts the requests of each adapter (`lora/lora_registry.py`, 0.5.17), and an unload waits until
there are none, with the lock that every load needs. The count is wrong for ever after a client that went away, a prompt
that is too long, and `n` above 1. Here an unload asks instead which requests there are: those that SGLang answers, and
those that it gave up and whose end its scheduler has not said yet. It waits for them before it takes the lock. When the
gap is mended, `tests/unit/serve/test_plugin.py` fails and says so.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.utils import ConcurrentCounter

_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
HOOKED = {
    "given_up": f"{_MANAGER}._discard_pending_req_states",
    "output": f"{_MANAGER}._handle_batch_output",
    "aborted": f"{_MANAGER}._handle_abort_req",
    "unload": f"{_MANAGER}.unload_lora_adapter",
    "unload_locked": f"{_MANAGER}._unload_lora_adapter_locked",
}
GIVE_UP_S = 20.0
_POLL_S = 0.005

_given_up: dict[str, str] = {}
"""{request: adapter} of what nobody waits for and the scheduler may still compute."""


def install() -> None:
    """Unload by what is computed, not by what was counted."""
    HookRegistry.register(HOOKED["given_up"], remember, HookType.BEFORE)
    HookRegistry.register(HOOKED["output"], forget_finished, HookType.BEFORE)
    HookRegistry.register(HOOKED["aborted"], forget_aborted, HookType.BEFORE)
    HookRegistry.register(HOOKED["unload"], unload_when_unused, HookType.AROUND)
    HookRegistry.register(HOOKED["unload_locked"], unload_uncounted, HookType.AROUND)
    HookRegistry.apply_hooks()


def remember(manager: Any, request: Any, *_: Any, **__: Any) -> None:
    """Its states are about to be dropped, and with them what would tell whose adapter they use."""
    logical = manager._logical_rids(request)
    children = (child for rid in logical for child in manager.logical_rid_to_child_rids.get(rid, ()))
    for rid in (*logical, *children):
        state = manager.rid_to_state.get(rid)
        if state is not None and state.dispatched and not state.finished and state.obj.lora_path:
            _given_up[rid] = state.obj.lora_path


def forget_finished(_: Any, output: Any, *__: Any) -> None:
    """The scheduler is done with these."""
    if not _given_up:
        return
    for rid, reason in zip(output.rids, output.finished_reasons, strict=True):
        if reason is not None:
            _given_up.pop(rid, None)


def forget_aborted(_: Any, abort: Any, *__: Any) -> None:
    """It was waiting, and never began."""
    _given_up.pop(abort.rid, None)


async def unload_when_unused(original: Callable[..., Awaitable[Any]], manager: Any, request: Any, *rest: Any) -> Any:
    """Unload once no request uses the adapter; loads go on meanwhile.

    Raises:
        TimeoutError: one still does after `GIVE_UP_S`.

    """
    deadline = time.monotonic() + GIVE_UP_S
    while True:
        await asyncio.sleep(_POLL_S)  # at least once: a request that has just ended takes itself off the count
        users = _users(manager, request.lora_name)
        if not users:
            return await original(manager, request, *rest)
        if time.monotonic() > deadline:
            raise TimeoutError(f"{request.lora_name} is still used by {len(users)} requests: {users[:3]}")


async def unload_uncounted(original: Callable[..., Awaitable[Any]], manager: Any, request: Any) -> Any:
    """Unload, with the lock, what nobody uses by now, whatever was counted.

    Raises:
        TimeoutError: somebody does.

    """
    if users := _users(manager, request.lora_name):
        raise TimeoutError(f"{request.lora_name} is used again by {len(users)} requests: {users[:3]}")
    adapter = manager.lora_registry._registry.get(request.lora_name)
    if adapter is not None:
        manager.lora_registry._counters[adapter.lora_id] = ConcurrentCounter()
    return await original(manager, request)


def _users(manager: Any, name: str) -> list[str]:
    living = [rid for rid, state in manager.rid_to_state.items() if getattr(state.obj, "lora_path", None) == name]
    return living + [rid for rid, adapter in _given_up.items() if adapter == name]
