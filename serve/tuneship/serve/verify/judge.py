"""From figures to a verdict's numbers and its fault. Pure. The reasons are in docs/decisions/0011-*."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from tuneship.serve.verify.statistics import (
    Effect,
    Rows,
    Spread,
    between,
    effect,
    explained,
    finite,
    lower_bound,
    upper_bound,
)
from tuneship.serve.verify.verdict import Fault

LIMIT_PER_FLOOR = 2.0
LEAST_LIMIT = Spread(0.01, 0.05)
"""The adapter's own path rounds too, which a floor measured without an adapter does not show."""
ARITHMETIC_32 = Spread(0.005, 0.025)
ARITHMETIC_16 = Spread(0.03, 0.12)
"""How far one checkpoint lies from itself in two implementations of 32 or 16 bits."""
LEAST_TOKENS = 30
"""Fewer answer tokens prove nothing: chance fails a healthy adapter, or passes a base, in a few of a hundred draws."""

_NEAR = 0.2
"""A model is taken for what answers when it is five times nearer to it than the trained one is."""
_ALIGNED = 0.9
_FOREIGN = 0.6
"""Alignments from which an effect is the trained one, and up to which it is another."""
_FULL_STRENGTH = (0.75, 1.33)


class OwnBase(NamedTuple):
    """When a served base is taken for the stored one: it explains so much of it, or is not farther than that."""

    explained: float
    nats: float


SAME_BITS = OwnBase(explained=0.95, nats=0.15)
OTHER_BITS = OwnBase(explained=0.5, nats=0.3)


class Figures(NamedTuple):
    """Log-probabilities of the same answer tokens, in nats; `trained` is the model that shall answer.

    For a merged model `served_base` is the stored base: its server has none.
    """

    base: Rows
    trained: Rows
    served_base: Rows
    served: Rows


class Measured(NamedTuple):
    """The numbers of a verdict. What few tokens leave open is in none's favour: between the two is `cannot tell`."""

    floor: Spread
    deviation: Spread
    surely: Spread
    """The least that the deviation can be."""
    limit: Spread
    """Of the largest that the floor can be."""
    power: float
    """How many limits the base surely is away."""
    effect: Effect

    @property
    def strong(self) -> bool:
        """Whether the base's answers would have been refused."""
        return self.power > 1

    @property
    def close(self) -> bool:
        """Whether what answers is as near to the trained model as this server lets it be."""
        return self.deviation.within(self.limit)

    @property
    def wrong(self) -> bool:
        """Whether what answers cannot be the trained model; figures that are no numbers are wrong."""
        low, high = _FULL_STRENGTH
        slope, alignment, uncertainty = self.effect
        weak = slope + uncertainty < low or slope - uncertainty > high
        return not self.surely.within(self.limit) or (alignment >= _ALIGNED and weak)


class Finding(NamedTuple):
    """What is wrong; `who` is the other model that answers, where it is known."""

    fault: Fault
    who: str = ""


def measure(figures: Figures, floor: Spread, uncertain: Spread) -> Measured:
    """Hold what answers against what was stored; `uncertain` is how large the floor may really be."""
    limit = uncertain.times(LIMIT_PER_FLOOR).at_least(LEAST_LIMIT)
    base = lower_bound(figures.served_base, figures.trained)
    return Measured(
        floor=floor,
        deviation=between(figures.served, figures.trained),
        surely=lower_bound(figures.served, figures.trained),
        limit=limit,
        power=max(base.mean / limit.mean, base.high / limit.high),
        effect=effect(*figures),
    )


def measure_adapter(figures: Figures) -> Measured:
    """With the floor that this server shows on the base."""
    return measure(
        figures,
        between(figures.served_base, figures.base),
        upper_bound(figures.served_base, figures.base),
    )


def measure_merged(figures: Figures, again: Rows, *, float32: bool) -> Measured:
    """With the floor of arithmetic, or what this server did to the same rows when it was asked `again`."""
    arithmetic = ARITHMETIC_32 if float32 else ARITHMETIC_16
    return measure(
        figures,
        between(figures.served, again).at_least(arithmetic),
        upper_bound(figures.served, again).at_least(arithmetic),
    )


def is_other_base(figures: Figures, own: OwnBase) -> bool:
    """Whether the served base cannot be the stored one, whatever its bits."""
    far = between(figures.served_base, figures.base).mean > own.nats
    return far and explained(figures.base, figures.served_base) < own.explained


def diagnose(figures: Figures, measured: Measured, others: Mapping[str, Rows]) -> Finding:
    """What answers, when it is not what was trained; `others` are the figures of other models of that server."""
    if not (finite(figures.served) and finite(figures.served_base)):
        return Finding(Fault.UNKNOWN)
    near = _NEAR * measured.deviation.mean
    if between(figures.served, figures.served_base).mean <= near:
        return Finding(Fault.BASE)
    for name, other in others.items():
        if between(figures.served, other).mean <= near:
            return Finding(Fault.OTHER_ADAPTER, name)
    if measured.effect.alignment >= _ALIGNED:
        return Finding(Fault.SCALE)
    if measured.effect.alignment < _FOREIGN:
        return Finding(Fault.OTHER_ADAPTER)
    return Finding(Fault.UNKNOWN)
