"""Two reports side by side: which result of one is measured as which of the other, whatever the folders are called.

counterpart(level, baseline.load, candidate.load)     # or results of tasks, or of held-out text
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from tuneship.core.report import EvalResult, LoadResult, NllResult

_Result = TypeVar("_Result", LoadResult, EvalResult, NllResult)


def counterpart(one: _Result, among: Sequence[_Result], others: Sequence[_Result]) -> _Result | None:
    """What of `others` was measured as `one` of `among` was; None where nothing was.

    Of a load: workload, arrivals, rate, concurrency. Of a task: scorer, data file's name, role, number of samples. Of
    held-out text: file's name and role. The model's name decides only where one side has several of the kind.
    """
    here = [result for result in among if _key(result) == _key(one)]
    there = [result for result in others if _key(result) == _key(one)]
    if len(here) > 1 or len(there) > 1:
        there = [result for result in there if result.model == one.model]
    return there[0] if there else None


def _key(result: LoadResult | EvalResult | NllResult) -> tuple[object, ...]:
    if isinstance(result, LoadResult):
        return result.workload, result.arrivals, result.rate, result.concurrency
    data = Path(result.data).name
    if isinstance(result, NllResult):
        return data, result.role
    # An own scorer is named by its whole path, which is another one in another checkout.
    prefix, colon, rest = result.task.partition(":")
    return prefix + colon + rest.rpartition("/")[2], data, result.role, result.samples
