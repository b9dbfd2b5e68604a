"""The parity that merging left to `verify`: what answers against the trained model, on held-out text.

Where the model did not fit in memory twice, merging measured nothing, and only the trained model's figures are stored.
So this asks what merging would have asked: by how many nats per answer token the served model is worse, one-sided.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from tuneship.core.parity import Deferred, ReferenceRow
from tuneship.serve.verify import rendering, words
from tuneship.serve.verify.judge import LEAST_TOKENS
from tuneship.serve.verify.rows import Answers
from tuneship.serve.verify.scorer import Scorer
from tuneship.serve.verify.statistics import Interval, Rows, Spread, interval
from tuneship.serve.verify.verdict import Fault, Outcome, Verdict
from tuneship.serve.verify.words import Said


async def verify(scorer: Scorer, selector: str | None, reference: Sequence[ReferenceRow], left: Deferred) -> Verdict:
    """Hold the merged model of this server against the trained one in `reference`, by the limit in `left`."""
    answers = Answers.of(reference)
    served, rendered = await asyncio.gather(answers.score(scorer, selector), rendering.compare(scorer, reference))
    worse, learnt = (
        interval(_differences(answers.trained, served)),
        interval(_differences(answers.trained, answers.base)),
    )
    outcome, fault, said = _judge(worse, learnt, left.limit, answers.tokens)
    if rendered.first_other and outcome is not Outcome.FAILED:
        outcome, fault, said = Outcome.FAILED, Fault.TEMPLATE, words.template(*rendered.first_other)
    return Verdict(
        outcome,
        fault,
        said.message,
        said.hint,
        deviation=Spread(worse.mean, 0.0),
        limit=Spread(left.limit, 0.0),
        power=learnt.low / left.limit if left.limit else 0.0,
        rows=len(answers.ids),
        tokens=answers.tokens,
        prompts=rendered.prompts,
    )


def _judge(worse: Interval, learnt: Interval, limit: float, tokens: int) -> tuple[Outcome, Fault, Said]:
    """What few tokens leave open is in nobody's favour."""
    found = f"{worse.mean:+.4f} nats per token worse than the trained model over {tokens} tokens (limit {limit:.4f})"
    if not worse.low <= limit:
        hint = "merge into the other base (merge.base), or serve the adapter"
        return Outcome.FAILED, Fault.MERGE, Said(f"the merged model is {found}", hint)
    if tokens < LEAST_TOKENS or worse.high > limit:
        return (
            Outcome.CANNOT_TELL,
            Fault.NONE,
            Said(f"{tokens} tokens are too few to tell: {found}", words.MORE_ROWS),
        )
    if learnt.low <= limit:
        said = Said(f"the base would pass, too: training changed these answers by {learnt.mean:.4f} nats per token")
        return Outcome.CANNOT_TELL, Fault.NONE, said
    return Outcome.PASSED, Fault.NONE, Said(found)


def _differences(one: Rows, other: Rows) -> Rows:
    """By how much each token is less likely under `other`."""
    return [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(one, other, strict=True)]
