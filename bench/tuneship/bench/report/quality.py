"""The quality tables: base and tuned side by side, by task and by held-out likelihood."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from tuneship.bench.report import examples
from tuneship.bench.report.examples import Group
from tuneship.core.report import EvalResult, NllResult, Report


class TaskRow(NamedTuple):
    """One line of the quality table."""

    name: str
    data: str
    base: EvalResult | None
    result: EvalResult | None
    examples: list[Group]

    @property
    def shown(self) -> EvalResult:
        """The result that the row is about."""
        shown = self.result or self.base
        assert shown is not None
        return shown

    @property
    def change(self) -> float | None:
        """Points won over the base."""
        return self.result.score - self.base.score if self.result and self.base else None


def task_rows(report: Report, folder: Path) -> list[TaskRow]:
    """A row a task, with examples from the items files in `folder`."""
    return [
        row._replace(examples=examples.choose(row.base if row.result else None, row.shown, folder))
        for row in pair_up(report)
    ]


def pair_up(report: Report) -> list[TaskRow]:
    """Base and tuned (or other) results of the same task and data side by side."""
    by_key: dict[tuple[str, str], dict[str, Any]] = {}
    for result in report.eval:
        side = "base" if result.role == "base" else "result"
        by_key.setdefault((result.task, result.data), {})[side] = result
    return [
        TaskRow(task, Path(data).name, sides.get("base"), sides.get("result"), [])
        for (task, data), sides in by_key.items()
    ]


class NllRow(NamedTuple):
    """One line of the table of held-out text."""

    data: str
    result: NllResult
    change: float | None
    """Nats per token against the base on the same rows; negative is better. None for the base, or without one."""


def nll_rows(report: Report) -> list[NllRow]:
    """A row a model and file, each with what it won over the base of the same rows."""
    bases = {_rows_of(result): result.nll for result in report.nll if result.role == "base"}
    return [
        NllRow(
            Path(result.data).name,
            result,
            result.nll - bases[_rows_of(result)] if result.role != "base" and _rows_of(result) in bases else None,
        )
        for result in report.nll
    ]


def _rows_of(result: NllResult) -> tuple[str, int, int]:
    return result.data, result.rows, result.tokens
