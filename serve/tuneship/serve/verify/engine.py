"""A `Scorer` behind the door: the engine itself, which knows versions that no client can reach yet."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from tuneship.core.errors import EngineError
from tuneship.serve.calls import Call
from tuneship.serve.catalog import Entry
from tuneship.serve.refusals import Refusal
from tuneship.serve.scoring import token_logprobs
from tuneship.serve.upstream import Upstream
from tuneship.serve.verify.scorer import (
    ALONE_TOKENS,
    STEP_TOKENS,
    Message,
    ServerFault,
    Tool,
    batches,
    prompt_ids,
)


class EngineScorer:
    """Selectors are the engine's own names; `base` is the entry of the model that it was started with.

    What needs no adapter is asked at once, and every figure when `loaded` is set. `in_flight` are the clients' requests
    of the moment, whose tokens a large step would delay.
    """

    def __init__(
        self,
        upstream: Upstream,
        base: Entry,
        loaded: asyncio.Event | None = None,
        in_flight: Callable[[], object] = lambda: None,
    ) -> None:
        self._upstream = upstream
        self._base = base
        self._loaded = loaded
        self._in_flight = in_flight

    async def logprobs(self, selector: str | None, rows: list[list[int]], starts: list[int]) -> list[list[float]]:
        """As `Scorer`.

        Raises:
            EngineError: the engine refused, failed, or is not there.

        """
        entry = self._base._replace(selector=selector)
        if self._loaded:
            await self._loaded.wait()
        found: list[list[float]] = []
        try:
            for batch in batches(rows, STEP_TOKENS if self._in_flight() else ALONE_TOKENS):
                found += await token_logprobs(self._upstream, entry, rows[batch], starts[batch], joined=True)
        except Refusal as refusal:
            raise _failure(refusal) from None
        return found

    async def tokenize(self, messages: list[Message], tools: list[Tool] | None = None) -> list[int]:
        """As `Scorer`.

        Raises:
            EngineError: as above.

        """
        try:
            return await prompt_ids(self._post, self._base.name, messages, tools)
        except (ServerFault, LookupError, TypeError) as error:
            raise EngineError("SGLang does not say how it renders a chat") from error

    async def _post(self, path: str, body: dict[str, Any]) -> Any:
        try:
            return json.loads(await self._upstream.fetch(path, Call(self._base, json.dumps(body).encode())))
        except Refusal as refusal:
            if refusal.status == 502:
                raise ServerFault(str(refusal)) from None
            raise _failure(refusal) from None


def _failure(refusal: Refusal) -> EngineError:
    return EngineError(f"SGLang could not be asked: {refusal}")
