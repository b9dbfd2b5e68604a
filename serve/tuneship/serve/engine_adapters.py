"""Adapters inside the running engine: load one, unload one, see that one computes.

SGLang keeps a lock while it unloads, until the last request of that adapter is over; the door therefore asks only when
nobody is in flight (`deploy.py`), and gives up after a time. And SGLang takes an adapter that was unloaded back from
its old path when somebody asks for it: names are never used twice, and the files are gone by then.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from tuneship.core.errors import EngineError, PreflightError
from tuneship.core.quoting import on_one_line
from tuneship.serve.joined import Prompts
from tuneship.serve.upstream import Upstream

LOAD_S = 120.0
UNLOAD_S = 30.0
_ANSWER_S = 120.0
_LONGEST_MESSAGE = 300
_QUESTION = list(range(1, 13))
"""Ids that every vocabulary has, more than one: over NF4 on an H100 one took 72 ms, and 512 took 27."""


async def load(upstream: Upstream, selector: str, path: Path, *, pinned: bool) -> None:
    """Load the adapter at `path` as `selector`.

    Raises:
        PreflightError: SGLang refused it.
        EngineError: the engine is not there, or said nothing in time.

    """
    body = {"lora_name": selector, "lora_path": str(path), "pinned": pinned}
    status, said = await upstream.tell("/load_lora_adapter", body, LOAD_S)
    if status == 200:
        return
    if status < 500:
        raise PreflightError(f"SGLang refused it: {_message(said)}", hint="the engine's log tells more")
    raise EngineError(f"SGLang failed to load it: {_message(said)}", hint="the engine's log tells more")


async def unload(upstream: Upstream, selector: str, timeout_s: float = UNLOAD_S) -> None:
    """Unload `selector`; one that is not there is unloaded.

    Raises:
        EngineError: the engine is not there, or said nothing in time.

    """
    status, said = await upstream.tell("/unload_lora_adapter", {"lora_name": selector}, timeout_s)
    if status >= 500:
        raise EngineError(f"SGLang failed to unload it: {_message(said)}", hint="the engine's log tells more")


async def answer_once(upstream: Upstream, selector: str) -> None:
    """A prompt for `selector`: that it computes at all, and its weights are where they are needed.

    In one request with what else the server asks at the moment, none of which has a token made. For that SGLang would
    begin another step before it reads what came of this one.

    Raises:
        PreflightError: SGLang refuses to generate with it.
        EngineError: the engine is not there, died of it, or said nothing in time.

    """
    try:
        async with asyncio.timeout(_ANSWER_S):
            if await upstream.joined.ask(Prompts(selector, [_QUESTION])):
                return
    except TimeoutError:
        raise EngineError(f"the engine said nothing to /generate within {_ANSWER_S:g} s") from None
    body = {"input_ids": _QUESTION, "sampling_params": {"max_new_tokens": 0, "temperature": 0}, "lora_path": selector}
    status, said = await upstream.tell("/generate", body, _ANSWER_S)
    if status != 200:
        raise PreflightError(f"it does not answer: {_message(said)}", hint="the engine's log tells more")


def _message(said: bytes) -> str:
    try:
        answer = json.loads(said)
        found = answer.get("error_message") or answer.get("error") or answer.get("message")
        told = str(found["message"] if isinstance(found, dict) else found)
    except (ValueError, AttributeError, LookupError):
        told = said.decode(errors="replace")
    return on_one_line(told[:_LONGEST_MESSAGE])
