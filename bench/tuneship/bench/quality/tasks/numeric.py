"""`numeric`: the last number in the answer is the last one in the reference, within the option `tolerance`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

# A sign counts where nothing stands before it: "7-5" ends in 5. Commas separate thousands.
_NUMBER = re.compile(r"(?:(?<![\w.])[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")


def score_numeric(answer: str, reference: str, extra: Mapping[str, Any]) -> float:
    """1.0 when the two numbers differ by at most `tolerance` (absolute, default 0), else 0.0.

    Raises:
        ValueError: the reference has no number, or `tolerance` is none.

    """
    wanted = last_number(reference)
    if wanted is None:
        raise ValueError("the reference has no number")
    tolerance = float(extra.get("tolerance", 0))
    found = last_number(answer)
    return float(found is not None and math.isclose(found, wanted, rel_tol=1e-12, abs_tol=tolerance))


def last_number(text: str) -> float | None:
    """The last number written in `text`; None without a finite one."""
    found = _NUMBER.findall(text)
    number = float(found[-1].replace(",", "")) if found else math.nan
    return number if math.isfinite(number) else None
