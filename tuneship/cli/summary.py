"""Tables for the terminal: a plan, and what a run measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from tuneship.cli.console import out
from tuneship.cli.settling import describe
from tuneship.core.files import short
from tuneship.core.hardware import gib
from tuneship.core.report import Percentiles, Report

if TYPE_CHECKING:
    from tuneship.serve.choice import Decision

_LENGTHS = (1024, 4096, 16384)
"""Tokens of a stream, prompt and answer, for which a plan says how many run at once."""


def show_plan(plan: Mapping[str, Any]) -> None:
    """Print what training would do."""
    table = _table("plan", "")
    for key, value in plan.items():
        if key.endswith("_bytes"):
            table.add_row(key.removesuffix("_bytes"), gib(value))
        else:
            table.add_row(key.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
    out.print(table)


def show_serving(decision: Decision) -> None:
    """Print what serving would do, and what of the device it takes."""
    plan = decision.plan
    table = _table("serving", "")
    table.add_row("mode", f"{describe(decision)} ({decision.reason})")
    table.add_row("device", f"{plan.device}, {gib(plan.device_bytes, 2)}")
    table.add_row("weights", gib(plan.weights_bytes, 2))
    if plan.slots:
        each = f"{plan.slots} of {plan.slots_bytes / plan.slots / 2**20:,.1f} MiB, one the base's"
        table.add_row("adapter slots", f"{gib(plan.slots_bytes, 2)} ({each})")
    table.add_row("KV cache", f"{gib(plan.kv_bytes, 2)} ({plan.kv_tokens:,} tokens, {plan.needed_tokens:,} wanted)")
    lengths = sorted({*_LENGTHS, plan.context_length or _LENGTHS[0]})
    fitting = [length for length in lengths if length <= (plan.context_length or length)]
    table.add_row("streams", ", ".join(f"{plan.streams(length):,} x {length:,} tokens" for length in fitting))
    table.add_row("reserve", f"{gib(plan.reserve_bytes, 2)} (activations, CUDA graphs)")
    table.add_row("runtime", gib(plan.runtime_bytes, 2))
    if plan.adapter_host_bytes:
        table.add_row("host memory", f"{plan.adapter_host_bytes / 2**20:,.0f} MiB an adapter of the largest rank")
    table.add_row("note", plan.remark)
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
    out.print(f"report  {short(folder / 'report.html')}", soft_wrap=True)


def _pair(values: Percentiles | None) -> str:
    return f"{values.p50:,.1f} / {values.p99:,.1f}" if values else "-"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < 1 else "right")
    return table
