"""An adapter from elsewhere: nobody stored what it says. That it is applied at all can still be seen.

What the base says to the same questions does not depend on the adapter: `Memory` keeps it for as long as an engine
lives. The base is asked once more beside each adapter, for a busy server is noisier than an idle one; and an adapter
that does not stand out clearly is held against figures of its own time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple

from tuneship.serve.verify.rows import Answers
from tuneship.serve.verify.scorer import Scorer
from tuneship.serve.verify.statistics import Rows, Spread, distances, finite, spread, upper_bound
from tuneship.serve.verify.verdict import Fault, Outcome, Verdict

_QUESTIONS = (
    "Which orders of the last month have not been shipped yet?",
    "Summarise in one sentence: the parcel was returned because nobody was at home.",
    "Write a function that adds two numbers.",
    "What is the total of the invoice, and when is it due?",
)
_NOTHING = Spread(1e-4, 1e-3)
"""Below this two sets of figures are one model's, even in 32 bits."""
_CLEARLY = 3.0
"""Times the noise, and a change is none of it, whenever the noise was measured."""


class Baseline(NamedTuple):
    """The questions as they are prefilled, what the base says to them, and how far it then is from itself."""

    asked: Answers
    said: Rows
    noise: Spread


class Memory:
    """The baseline of the engine that `engine` is at the moment; another one is asked anew."""

    def __init__(self, engine: Callable[[], object] = lambda: None) -> None:
        self._engine = engine
        self._known: tuple[object, Baseline] | None = None

    async def baseline(self, scorer: Scorer) -> Baseline:
        """What is known of it, or is found out now."""
        engine = self._engine()
        if self._known and self._known[0] is engine:
            return self._known[1]
        found = await _baseline(scorer)
        if self._engine() is engine:
            self._known = (engine, found)
        return found


async def verify(scorer: Scorer, selector: str | None, memory: Memory | None = None) -> Verdict:
    """Score some conversations under the base and under the adapter, which must make a difference.

    It is proven broken when it makes none beyond the server's own noise, and nothing is proven when it makes one.
    """
    asked, said, noise = await (memory or Memory()).baseline(scorer)
    again, served = await asyncio.gather(asked.score(scorer, None), asked.score(scorer, selector))
    noise = noise.at_least(upper_bound(distances(again, said)))
    if spread(distances(served, said)).within(noise.times(_CLEARLY)):
        _, said, noise = await _measure(scorer, asked)
        noise = noise.at_least(upper_bound(distances(again, said)))
    change = spread(distances(served, said))
    return _verdict(served, noise, change)._replace(
        noise_floor=noise, deviation=change, rows=len(asked.ids), tokens=asked.tokens
    )


async def _baseline(scorer: Scorer) -> Baseline:
    prompts = await asyncio.gather(*(scorer.tokenize([{"role": "user", "content": text}]) for text in _QUESTIONS))
    masks = [[0] + [1] * (len(ids) - 1) for ids in prompts]
    return await _measure(scorer, Answers(list(prompts), masks, [], []))


async def _measure(scorer: Scorer, asked: Answers) -> Baseline:
    """The base's figures of all questions at once, and of each alone: other batches, and so other roundings."""
    said = await asked.score(scorer, None)
    alone = await asked.score_apart(scorer, None)
    return Baseline(asked, said, upper_bound(distances(said, alone)).at_least(_NOTHING))


def _verdict(served: Rows, noise: Spread, change: Spread) -> Verdict:
    if not finite(served):
        return Verdict(Outcome.FAILED, Fault.UNKNOWN, "its log-probabilities are no numbers", "save it again, in bf16")
    if change.within(noise):
        return Verdict(
            Outcome.FAILED,
            Fault.BASE,
            f"its answers are the base's: {change.mean:.4f} nats per token apart, as the server is from itself",
            "the adapter is not applied, or its weights are zero",
        )
    return Verdict(
        Outcome.NO_EVIDENCE,
        Fault.NONE,
        f"it is applied ({change.mean:.3f} nats per token from the base); nobody stored what it should say",
        "adapters of `tuneship train` bring their evidence",
    )
