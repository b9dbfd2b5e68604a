"""From figures to a verdict's numbers and its fault. Pure. The reasons are in docs/decisions/0011-*."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from tuneship.serve.verify.statistics import (
    Effect,
    Rows,
    Spread,
    carried_over,
    distances,
    effect,
    explained,
    finite,
    lower_bound,
    spread,
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

_ARITHMETIC_ALONE = 0.1
"""Nats per token between two servers of the same weights that no 16-bit arithmetic was seen to exceed."""
_NEAR = 0.2
"""A model is taken for what answers when it is five times nearer to it than the trained one is."""
_ALIGNED = 0.8
_FOREIGN = 0.7
"""Alignments from which an effect is the trained one, and up to which it is another."""


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
    base_noise: Spread
    """The served base against the stored one, before that is carried over to the trained model."""
    deviation: Spread
    surely: Spread
    """The least that the deviation can be."""
    limit: Spread
    """Of the largest that the floor can be."""
    power: float
    """How many limits the base surely is away."""
    effect: Effect

    @property
    def other_bits(self) -> bool:
        """Whether the served base is farther from the stored one than arithmetic of one kind of weights makes it."""
        return self.base_noise.mean > _ARITHMETIC_ALONE

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
        return not self.surely.within(self.limit)


class Finding(NamedTuple):
    """What is wrong; `who` is the other model that answers, where it is known."""

    fault: Fault
    who: str = ""


def measure(figures: Figures, floor: Spread, uncertain: Spread) -> Measured:
    """Hold what answers against what was stored; `uncertain` is how large the floor may really be."""
    limit = uncertain.times(LIMIT_PER_FLOOR).at_least(LEAST_LIMIT)
    deviation = distances(figures.served, figures.trained)
    base = lower_bound(distances(figures.served_base, figures.trained))
    return Measured(
        floor=floor,
        base_noise=spread(distances(figures.served_base, figures.base)),
        deviation=spread(deviation),
        surely=lower_bound(deviation),
        limit=limit,
        power=max(base.mean / limit.mean, base.high / limit.high),
        effect=effect(*figures),
    )


def measure_adapter(figures: Figures) -> Measured:
    """With the floor that this server shows on the base, carried over to the trained model."""
    noise = carried_over(distances(figures.served_base, figures.base), figures.base, figures.trained)
    return measure(figures, spread(noise), upper_bound(noise))


def measure_merged(figures: Figures, again: Rows, *, float32: bool) -> Measured:
    """With the floor of arithmetic, or what this server did to the same rows when it was asked `again`."""
    arithmetic = ARITHMETIC_32 if float32 else ARITHMETIC_16
    noise = distances(figures.served, again)
    return measure(figures, spread(noise).at_least(arithmetic), upper_bound(noise).at_least(arithmetic))


def is_other_base(figures: Figures, own: OwnBase) -> bool:
    """Whether the served base cannot be the stored one, whatever its bits."""
    far = _apart(figures.served_base, figures.base) > own.nats
    return far and explained(figures.base, figures.served_base) < own.explained


def is_missing(figures: Figures) -> bool:
    """Whether the adapter does nothing to its base, where training did something: both are served in the same bits."""
    return _apart(figures.served, figures.served_base) <= _NEAR * _apart(figures.trained, figures.base)


def diagnose(figures: Figures, measured: Measured, others: Mapping[str, Rows]) -> Finding:
    """What answers, when it is not what was trained; `others` are the figures of other models of that server."""
    if not (finite(figures.served) and finite(figures.served_base)):
        return Finding(Fault.UNKNOWN)
    near = _NEAR * measured.deviation.mean
    if _apart(figures.served, figures.served_base) <= near:
        return Finding(Fault.BASE)
    for name, other in others.items():
        if _apart(figures.served, other) <= near:
            return Finding(Fault.OTHER_ADAPTER, name)
    if measured.effect.alignment >= _ALIGNED:
        return Finding(Fault.SCALE)
    if measured.effect.alignment < _FOREIGN:
        return Finding(Fault.OTHER_ADAPTER)
    return Finding(Fault.UNKNOWN)


def _apart(one: Rows, other: Rows) -> float:
    return spread(distances(one, other)).mean
