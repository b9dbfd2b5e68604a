"""Past reports: found on disk, one line each, oldest first."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from tuneship.bench.report.headline import best_level, format_ms
from tuneship.core.errors import TuneshipError
from tuneship.core.report import Report, read_report

_COLUMNS = ("created", "name", "testbed", "score", "TTFT ms", "TPOT ms", "tok/s", "file")
_PIPE_WIDTH = 240


class HistoryRow(NamedTuple):
    """One report. Speed is that of its heaviest valid level; what was not measured is None."""

    created_at: str
    name: str
    digest: str
    """Of the testbed: figures of different ones are not comparable."""
    score: float | None
    """Of the first eval that is not the base's, in 0..1."""
    ttft_ms: float | None
    """Median."""
    tpot_ms: float | None
    """Median."""
    tokens_per_s: float | None
    """Output."""
    file: str


class History(NamedTuple):
    """What was found; `skipped` says of each unreadable report why."""

    rows: list[HistoryRow]
    skipped: list[str]


def collect(folders: Sequence[Path]) -> History:
    """Read every `report.json` below `folders`; one that cannot be read is skipped and named."""
    rows, skipped = [], []
    for path in sorted({path.resolve(): path for folder in folders for path in folder.rglob("report.json")}.values()):
        try:
            rows.append(summarize(read_report(path), path))
        except TuneshipError as error:
            skipped.append(str(error))
    return History(sorted(rows, key=lambda row: row.created_at), skipped)


def summarize(report: Report, path: Path) -> HistoryRow:
    """The line of one report."""
    evals = sorted(report.eval, key=lambda result: result.role == "base")
    level = best_level(report)
    return HistoryRow(
        created_at=report.created_at,
        name=report.name,
        digest=report.testbed.digest,
        score=evals[0].score if evals else None,
        ttft_ms=level.ttft_ms.p50 if level and level.ttft_ms else None,
        tpot_ms=level.tpot_ms.p50 if level and level.tpot_ms else None,
        tokens_per_s=level.output_tokens_per_s if level else None,
        file=str(path),
    )


def show(rows: Sequence[HistoryRow]) -> None:
    """Print one line a report on stdout."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in _COLUMNS:
        figure = name in {"score", "TTFT ms", "TPOT ms", "tok/s"}
        table.add_column(name, justify="right" if figure else "left", no_wrap=name != "file", overflow="fold")
    for row in rows:
        score = "-" if row.score is None else f"{row.score:.3f}"
        speed = [format_ms(value) for value in (row.ttft_ms, row.tpot_ms, row.tokens_per_s)]
        table.add_row(row.created_at, row.name, row.digest, score, *speed, row.file)
    # A pipe has no width: do not fold paths to 80 columns there.
    Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH).print(table, highlight=False)


def default_folders() -> list[Path]:
    """Where reports are written by default: `runs/` and `bench-*/` of this folder."""
    return [path for path in (Path("runs"), *sorted(Path().glob("bench-*"))) if path.is_dir()]
