"""The declared metrics of speed: what every comparison of loads judges, live or stored, and Holm corrects for."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from tuneship.core.report import Block, LoadResult, Percentiles

Field = Literal["ttft_ms", "tpot_ms", "e2e_ms", "output_tokens_per_s"]


class Metric(NamedTuple):
    """One figure of a load level (the median of a latency), or of a block of one."""

    name: str
    field: Field
    sign: int = 1
    """-1 where higher is better: then its inverse is compared, as time per token, so that half is worse by 100 %."""

    def value(self, measured: LoadResult | Block | None) -> float | None:
        """The figure; None where nothing was measured."""
        found = getattr(measured, self.field, None)
        return found.p50 if isinstance(found, Percentiles) else found

    def log_ratio(self, a: LoadResult | Block | None, b: LoadResult | Block | None) -> float | None:
        """log(b / a), positive where b is worse; None where either has no figure."""
        value_a, value_b = self.value(a), self.value(b)
        return self.sign * math.log(value_b / value_a) if value_a and value_b else None


LOAD_METRICS = (
    Metric("TTFT p50 ms", "ttft_ms"),
    Metric("TPOT p50 ms", "tpot_ms"),
    Metric("E2E p50 ms", "e2e_ms"),
    Metric("output tokens/s", "output_tokens_per_s", sign=-1),
)
