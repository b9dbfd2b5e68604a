"""Results as tables on stdout; talk goes to stderr through `core.progress`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tuneship.bench.compare.again import Pace, decide
from tuneship.bench.compare.live import Expected
from tuneship.bench.compare.outputs import COLUMNS, cells
from tuneship.core.report import Comparison, EvalResult, LoadResult, NllResult, Percentiles

_PIPE_WIDTH = 140


def show_load(levels: Sequence[LoadResult]) -> None:
    """One line a load level."""
    table = _table("load", "sent", "failed", *_PAIRS, "tok/s", "client")
    for level in levels:
        table.add_row(
            level.offered,
            str(level.requests),
            str(level.requests - level.completed),
            *(_pair(latency) for latency in (level.ttft_ms, level.tpot_ms, level.itl_ms, level.e2e_ms)),
            f"{level.output_tokens_per_s:.1f}",
            "ok" if level.client.valid else f"lags {level.client.lag_p99_ms:.0f} ms",
        )
    _print(table)


def show_evals(results: Sequence[EvalResult]) -> None:
    """One line a task."""
    table = _table("task", "model", "role", "items", "errors", "score", "stderr")
    for r in results:
        table.add_row(r.task, r.model, r.role, str(r.items), str(r.errors), f"{r.score:.3f}", f"{r.stderr:.3f}")
    _print(table)


def show_nll(results: Sequence[NllResult]) -> None:
    """One line a model and file; NLL in nats per answer token."""
    table = _table("data", "model", "role", "rows", "tokens", "NLL", "stderr", "perplexity")
    for r in results:
        figures = (f"{r.nll:.4f}", f"{r.stderr:.4f}", f"{r.perplexity:.4g}")
        table.add_row(Path(r.data).name, r.model, r.role, str(r.rows), str(r.tokens), *figures)
    _print(table)


def show_comparison(rows: Sequence[Comparison], pace: Pace | None = None) -> None:
    """One line a metric, and below them what to run where they cannot tell, and how long that takes at this `pace`."""
    table = _table(*COLUMNS)
    styles = {"regressed": "red", "cannot tell": "yellow"}
    for row in rows:
        table.add_row(*(escape(cell) for cell in cells(row, brief=True)), style=styles.get(row.verdict))
    _print(table)
    for command in decide(row.next_step for row in rows):
        print(f"to decide{f', in {pace.of(command)}' if pace else ''}: {command}")


def show_calibration(rows: Sequence[Expected]) -> None:
    """One line a metric of each load: how far equals differ, and how many pairs it takes."""
    table = _table("load", "metric", "pair to pair", "pairs to decide", "run to run")
    for row in rows:
        shares = [f"{sd:.1%}" if sd is not None else "-" for sd in (row.pair_noise, row.run_noise)]
        table.add_row(row.load, row.metric, shares[0], str(row.pairs or "-"), shares[1])
    _print(table)


_PAIRS = tuple(f"{name} p50/p99 ms" for name in ("TTFT", "TPOT", "ITL", "E2E"))


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        text = column in {"task", "data", "model", "role", "metric", "verdict", "client"}
        table.add_column(column, justify="left" if text else "right", no_wrap=column != "verdict")
    return table


def _pair(latency: Percentiles | None) -> str:
    return f"{latency.p50:.1f} / {latency.p99:.1f}" if latency else "-"


def _print(table: Table) -> None:
    # A pipe has no width: do not cut figures to 80 columns there.
    Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH).print(table)
