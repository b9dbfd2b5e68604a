"""What `verify` finds, as types."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from tuneship.core.errors import ParityError
from tuneship.serve.verify.statistics import Spread


class Outcome(StrEnum):
    """How sure it is. Only `PASSED` says that what answers is what was trained."""

    PASSED = "passed"
    FAILED = "failed"
    CANNOT_TELL = "cannot tell"
    """The served base is so far from the stored one that the base's own answers would have passed."""
    NO_EVIDENCE = "no evidence"
    """Nobody stored what the trained model says."""


class Fault(StrEnum):
    """What answers instead."""

    NONE = ""
    BASE = "base"
    OTHER_ADAPTER = "other-adapter"
    SCALE = "scale"
    OTHER_BASE = "other-base"
    TEMPLATE = "template"
    MERGE = "merge"
    """What was trained, less good than it was: merging lost it."""
    UNKNOWN = "unknown"


class Verdict(NamedTuple):
    """Spreads are in nats per answer token."""

    outcome: Outcome
    fault: Fault
    message: str
    hint: str = ""
    noise_floor: Spread = Spread(0.0, 0.0)
    """Adapters: what parts the served base from the stored one, carried over to the trained model, which is surer.
    Merged: what the server's arithmetic alone may do."""
    base_noise: Spread = Spread(0.0, 0.0)
    """The served base against the stored one, as it was measured."""
    deviation: Spread = Spread(0.0, 0.0)
    """What answers, against the trained (or merged) model as it was stored."""
    limit: Spread = Spread(0.0, 0.0)
    power: float = 0.0
    """How many limits away from the trained model the base's answers are; below 1 nothing is proven."""
    scale: float | None = None
    """The share of training's effect that is there. Near 1 also where strength is wrong and the effect saturates."""
    rows: int = 0
    tokens: int = 0
    """Answer tokens, over all rows."""
    prompts: int = 0
    """Conversations whose rendering was held against training's."""

    @property
    def passed(self) -> bool:
        """Whether it is proven."""
        return self.outcome is Outcome.PASSED

    @property
    def verified(self) -> str:
        """One line for a registry: `passed`, `no evidence`, `cannot tell: ...` or `failed: ...`."""
        if self.outcome in {Outcome.PASSED, Outcome.NO_EVIDENCE}:
            return self.outcome.value
        return f"{self.outcome.value}: {self.message}"

    def require(self) -> None:
        """Let everything through but a proven fault.

        Raises:
            ParityError: it failed.

        """
        if self.outcome is Outcome.FAILED:
            raise ParityError(self.message, hint=self.hint)
