"""Does the server render conversations as training did? The prompt's ids, up to the last answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from tuneship.core.parity import ReferenceRow
from tuneship.serve.verify.scorer import Message, Scorer

_AT_ONCE = 2
"""SGLang renders in the process through which every request goes, one by one: whoever comes next waits for these."""


class Rendering(NamedTuple):
    """`prompts` conversations were compared; `first_other` (its number, the position) is the first that differs."""

    prompts: int
    first_other: tuple[int, int] | None = None


async def compare(scorer: Scorer, reference: Sequence[ReferenceRow]) -> Rendering:
    """Ask the server how it renders each conversation of `reference` that is known."""
    known = [(number, row, row.messages) for number, row in enumerate(reference) if row.messages]
    few = asyncio.Semaphore(_AT_ONCE)

    async def ids_of(row: ReferenceRow, messages: list[Message]) -> list[int]:
        async with few:
            return await scorer.tokenize(messages[:-1], row.tools)

    rendered = await asyncio.gather(*(ids_of(row, messages) for _, row, messages in known))
    for (number, row, _), ids in zip(known, rendered, strict=True):
        position = first_difference(row, ids)
        if position is not None:
            return Rendering(len(known), (number, position))
    return Rendering(len(known))


def first_difference(row: ReferenceRow, ids: list[int]) -> int | None:
    """The position at which a rendered prompt is not the one of training; None where it is the same.

    The prompt ends where the last answer begins. A row that carries loss everywhere does not say where that is: then
    what was rendered must be its beginning.
    """
    wanted = row.input_ids[: _last_answer(row.loss_mask) or len(ids)]
    if ids == wanted:
        return None
    same = (index for index, pair in enumerate(zip(ids, wanted, strict=False)) if pair[0] != pair[1])
    return next(same, min(len(ids), len(wanted)))


def _last_answer(mask: list[int]) -> int:
    """Where the last run of tokens with loss begins."""
    end = next((index for index in range(len(mask), 0, -1) if mask[index - 1]), 0)
    return next((index for index in range(end, 0, -1) if not mask[index - 1]), 0)
