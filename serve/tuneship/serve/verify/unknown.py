"""An adapter from elsewhere: nobody stored what it says. That it is applied at all can still be seen."""

from __future__ import annotations

import asyncio

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


async def verify(scorer: Scorer, selector: str | None) -> Verdict:
    """Score some conversations under the base (twice) and under the adapter, which must make a difference.

    It is proven broken when it makes none beyond the server's own noise, and nothing is proven when it makes one.
    """
    prompts = await asyncio.gather(*(scorer.tokenize([{"role": "user", "content": text}]) for text in _QUESTIONS))
    masks = [[0] + [1] * (len(ids) - 1) for ids in prompts]
    asked = Answers(list(prompts), masks, [], [])
    base, served = await asyncio.gather(asked.score(scorer, None), asked.score(scorer, selector))
    noise = upper_bound(distances(base, await asked.score_apart(scorer, None))).at_least(_NOTHING)
    change = spread(distances(served, base))
    return _verdict(served, noise, change)._replace(
        noise_floor=noise, deviation=change, rows=len(prompts), tokens=asked.tokens
    )


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
