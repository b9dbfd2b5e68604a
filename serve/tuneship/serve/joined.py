"""What the server itself asks its engine at one moment, in one request.

    results = await upstream.joined.ask(Prompts(selector, rows, starts))     # None: ask alone

SGLang computes the prompts of a request in one prefill step, whichever adapters they are of. What comes in a request of
its own, a moment later, waits for a step of its own, and on a GPU a step takes its time however few tokens it has.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

from tuneship.serve.refusals import Refusal

Send = Callable[[dict[str, Any]], Awaitable[bytes]]
"""(body of SGLang's `/generate`) -> its answer; `Refusal` where there is none."""


class Prompts(NamedTuple):
    """Token ids that one model is asked about; `selector` None is the base."""

    selector: str | None
    ids: Sequence[list[int]]
    starts: Sequence[int] | None = None
    """Of each prompt, from where on its log-probabilities are wanted; None: of none."""


class Joined:
    """Whoever asks while others are about to, is asked with them."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._next: _Round | None = None

    async def ask(self, prompts: Prompts) -> list[Any] | None:
        """SGLang's results, one for each prompt; None where nobody else asks, or the request failed: then ask alone."""
        if self._next is None:
            asked = list[Prompts]()
            self._next = _Round(asked, asyncio.create_task(self._answers(asked)))
        mine = self._next
        number = len(mine.asked)
        mine.asked.append(prompts)
        mine.waiting += 1
        try:
            return (await asyncio.shield(mine.answers))[number]
        finally:
            mine.waiting -= 1
            if not mine.waiting:  # nobody wants to know any more
                mine.answers.cancel()
                self._next = None if self._next is mine else self._next

    async def _answers(self, asked: list[Prompts]) -> Sequence[list[Any] | None]:
        await asyncio.sleep(0)  # whoever waited for the same moment asks now
        self._next = None
        return await self._found(asked)

    async def _found(self, asked: Sequence[Prompts]) -> Sequence[list[Any] | None]:
        nothing = [None] * len(asked)
        if len(asked) == 1:
            return nothing
        try:
            results = json.loads(await self._send(_body(asked)))
        except (Refusal, ValueError):  # whose fault it is shows when each is asked alone
            return nothing
        if not isinstance(results, list) or len(results) != sum(len(prompts.ids) for prompts in asked):
            return nothing
        rest = iter(results)
        return [[next(rest) for _ in prompts.ids] for prompts in asked]


class _Round:
    """Those that ask together, and what comes of it."""

    def __init__(self, asked: list[Prompts], answers: asyncio.Task[Sequence[list[Any] | None]]) -> None:
        self.asked = asked
        self.answers = answers
        self.waiting = 0


def _body(asked: Sequence[Prompts]) -> dict[str, Any]:
    each = [prompts for prompts in asked for _ in prompts.ids]
    starts = [start for prompts in asked for start in prompts.starts or [-1] * len(prompts.ids)]
    body: dict[str, Any] = {
        "input_ids": [ids for prompts in asked for ids in prompts.ids],
        "return_logprob": [prompts.starts is not None for prompts in each],
        "logprob_start_len": starts,
        "sampling_params": [{"max_new_tokens": 0, "temperature": 0}] * len(each),
    }
    if any(prompts.selector for prompts in asked):
        body["lora_path"] = [prompts.selector for prompts in each]
    return body
