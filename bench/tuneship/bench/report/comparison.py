"""Two stored reports side by side: which of their common tasks' items changed, from right to wrong and back."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tuneship.bench.counterparts import counterpart
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
    """The tasks of `baseline` that `candidate` has too; items files are named relative to the folders."""
    pairs = ((ours, counterpart(ours, baseline.eval, candidate.eval)) for ours in baseline.eval)
    return [_compare(ours, folder, theirs, candidate_folder) for ours, theirs in pairs if theirs]


def _compare(ours: EvalResult, folder: Path, theirs: EvalResult, candidate_folder: Path) -> TaskChange:
    before = {item.index: item for item in examples.read(ours, folder)}
    items = [
        item
        for item in examples.read(theirs, candidate_folder)
        if item.index in before and item.question == before[item.index].question
    ]
    return TaskChange(ours, theirs, len(items), examples.changed(before, items, _SHOWN))
