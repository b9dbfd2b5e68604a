"""Two stored reports side by side: which of their common tasks' items changed, from right to wrong and back."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tuneship.bench.quality.evaluate import Item
from tuneship.bench.report import examples
from tuneship.bench.report.examples import Group
from tuneship.core.report import EvalResult, Report

_SHOWN = 20
"""Of each kind and task; all are counted."""


class TaskChange(NamedTuple):
    """One task that both reports have."""

    baseline: EvalResult
    candidate: EvalResult
    common: int
    """Items that both were asked, with the same question and reference."""
    groups: list[Group]

    @property
    def title(self) -> str:
        """The task and its file's name."""
        return f"{self.candidate.task}, {Path(self.candidate.data).name}"

    @property
    def why_none(self) -> str:
        """Why nothing can be shown; empty when items were compared."""
        return "" if self.common else "the items files are gone, or hold other questions"


def common_tasks(baseline: Report, folder: Path, candidate: Report, candidate_folder: Path) -> list[TaskChange]:
    """The tasks of `baseline` that `candidate` has too: same scorer, data file's name, role and number of samples.

    Items files are named relative to the folders. Where a report has a task several times, the model's name decides.
    """
    found = []
    for ours in baseline.eval:
        twins = [result for result in baseline.eval if _key(result) == _key(ours)]
        theirs = [result for result in candidate.eval if _key(result) == _key(ours)]
        if len(twins) > 1 or len(theirs) > 1:
            theirs = [result for result in theirs if result.model == ours.model]
        if theirs:
            found.append(_compare(ours, folder, theirs[0], candidate_folder))
    return found


def _compare(ours: EvalResult, folder: Path, theirs: EvalResult, candidate_folder: Path) -> TaskChange:
    before = {item.index: item for item in examples.read(ours, folder)}
    items = [
        item
        for item in examples.read(theirs, candidate_folder)
        if item.index in before and _question(item) == _question(before[item.index])
    ]
    return TaskChange(ours, theirs, len(items), examples.changed(before, items, _SHOWN))


def _key(result: EvalResult) -> tuple[str, str, str, int]:
    # An own scorer is named by its whole path, which is another one in another checkout.
    prefix, colon, rest = result.task.partition(":")
    return prefix + colon + rest.rpartition("/")[2], Path(result.data).name, result.role, result.samples


def _question(item: Item) -> tuple[object, str]:
    return item.prompt, item.reference
