"""From tests to verdicts: regressed, no worse than the margin, or cannot tell and what to run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from tuneship.bench.compare.statistics import holm
from tuneship.core.report import Comparison


class Evidence(NamedTuple):
    """What is known of one declared metric; `worse_by` and its bounds in `unit`, positive is worse."""

    metric: str
    a: float | None
    b: float | None
    margin: float
    unit: Literal["ratio", "points", "nats"] = "ratio"
    worse_by: float = 0.0
    lower: float = -math.inf
    upper: float = math.inf
    p: float = 1.0
    pairs: int = 0
    detectable: float = math.inf
    doubt: str = ""
    """Why this metric says nothing: errors, a busy client, nothing measured. Empty when it does."""
    next_step: str = ""


def judge(evidence: Sequence[Evidence], alpha: float = 0.05) -> list[Comparison]:
    """Verdicts, in the order given.

    - regressed: "no worse" is rejected after Holm, and the interval does not lie wholly below the margin;
    - no worse than the margin: the one-sided upper bound at 1 - alpha is below the margin;
    - cannot tell: neither, or there is a doubt. A metric with a doubt still counts in Holm's family: it was declared.
    """
    adjusted = holm([1.0 if found.doubt else found.p for found in evidence])
    return [_judge(found, p, alpha) for found, p in zip(evidence, adjusted, strict=True)]


def _judge(found: Evidence, p: float, alpha: float) -> Comparison:
    ratio = found.b / found.a if found.a and found.b is not None else None
    named = {"metric": found.metric, "a": found.a, "b": found.b, "ratio": ratio, "unit": found.unit}
    if found.doubt:
        doubtful = {"verdict": "cannot tell", "reason": found.doubt, "next_step": found.next_step}
        return Comparison.model_validate(named | {"margin": found.margin} | doubtful)
    bounded = math.isfinite(found.lower) and math.isfinite(found.upper)
    figures = {
        "worse_by": found.worse_by,
        "ci": (found.lower, found.upper) if bounded else None,
        "margin": found.margin,
        "p": p,
        "pairs": found.pairs,
        "detectable": found.detectable if math.isfinite(found.detectable) else None,
    }
    if found.upper < found.margin:
        verdict = {"verdict": "no worse than the margin"}
    elif p <= alpha:
        verdict = {"verdict": "regressed"}
    else:
        interval = f"between {found.lower:+.3g} and {found.upper:+.3g}" if bounded else "too few for an interval"
        reason = f"{interval}, the margin is {found.margin:.3g}"
        verdict = {"verdict": "cannot tell", "reason": reason, "next_step": found.next_step}
    return Comparison.model_validate(named | figures | verdict)
