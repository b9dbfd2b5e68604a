"""Tables for the terminal: a plan, and what a run measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from tuneship.cli.console import out
from tuneship.core.report import Percentiles, Report


def show_plan(plan: Mapping[str, Any]) -> None:
    """Print what training would do."""
    table = _table("plan", "")
    for key, value in plan.items():
        if key.endswith("_bytes"):
            table.add_row(key.removesuffix("_bytes"), f"{value / 2**30:.1f} GiB")
        else:
            table.add_row(key.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
    out.print(table)


def show(report: Report, folder: Path) -> None:
    """Print quality, load and parity of a run, and where its report lies."""
    if report.eval:
        table = _table("task", "model", "items", "score")
        for result in report.eval:
            table.add_row(result.task, result.role, str(result.items), f"{result.score:.3f} ± {result.stderr:.3f}")
        out.print(table)
    if report.nll:
        table = _table("held-out text", "model", "tokens", "NLL", "perplexity")
        for nll in report.nll:
            nats = f"{nll.nll:.4f} ± {nll.stderr:.4f}"
            table.add_row(Path(nll.data).name, nll.role, f"{nll.tokens:,}", nats, f"{nll.perplexity:.4g}")
        out.print(table)
    if report.load:
        goodput = any(level.goodput is not None for level in report.load)
        columns = ["offered", "completed", "TTFT p50 / p99 ms", "TPOT p50 / p99 ms", "output tok/s"]
        table = _table(*columns, *(["goodput"] if goodput else []))
        for level in report.load:
            table.add_row(
                level.offered,
                f"{level.completed}/{level.requests}",
                _pair(level.ttft_ms),
                _pair(level.tpot_ms),
                f"{level.output_tokens_per_s:,.1f}" + ("" if level.client.valid else "  (client too slow: invalid)"),
                *([f"{level.goodput:.1%}" if level.goodput is not None else "-"] if goodput else []),
            )
        out.print(table)
    if report.parity:
        parity = report.parity
        out.print(
            f"parity  merged is {parity.nll_increase:+.4f} nats/token from trained "
            f"over {parity.tokens:,} held-out tokens (limit {parity.limit}), KL {parity.kl_mean:.4f}"
        )
    out.print(f"report  {folder / 'report.html'}", soft_wrap=True)


def _pair(values: Percentiles | None) -> str:
    return f"{values.p50:,.1f} / {values.p99:,.1f}" if values else "-"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < 1 else "right")
    return table
