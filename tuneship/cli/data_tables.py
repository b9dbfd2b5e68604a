"""`data check` on the terminal: the figures of both splits, then what was found and where."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from rich.markup import escape
from rich.table import Table

from tuneship.cli.console import out

if TYPE_CHECKING:
    from tuneship.train.data.check import Finding, Report, Split


class _Line(NamedTuple):
    """One finding of one split, as a person reads it."""

    split: str
    what: str
    finding: Finding
    is_refused: bool = False


def show_check(report: Report) -> None:
    """Print the report."""
    splits = {"train": report.train} | ({"heldout": report.heldout} if report.heldout else {})
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("data")
    for name in splits:
        table.add_column(name, justify="right")
    columns = [dict(_figures(split)) for split in splits.values()]
    for label in dict.fromkeys(label for column in columns for label in column):
        table.add_row(label, *(column.get(label, "-") for column in columns))
    out.print(table)
    lines = [line for line in _lines(report, splits) if line.finding.rows]
    for line in lines:
        _show_line(line)
    if not lines:
        out.print("\nevery row can be used; none stands there twice, or in held-out too")
    for note in report.notes:
        out.print(f"\n[yellow]note[/]: {escape(note)}", soft_wrap=True, highlight=False)


def _figures(split: Split) -> Iterator[tuple[str, str]]:
    yield "rows", f"{split.rows:,}"
    yield "usable", f"{split.usable:,}"
    yield "tokens", f"{split.tokens:,}"
    share = f" ({split.loss_tokens / split.tokens:.1%})" if split.tokens else ""
    yield "with loss", f"{split.loss_tokens:,}{share}"
    yield "tokens a row, median", f"{split.median:,}"
    for part, length in split.needed.items():
        yield f"max_length for {part} of rows", f"{length:,}"


def _lines(report: Report, splits: dict[str, Split]) -> Iterator[_Line]:
    """What there is to say, the worst first."""
    for name, split in splits.items():
        for reason, finding in sorted(split.refused.items(), key=lambda item: -item[1].rows):
            yield _Line(name, f"refused: {reason}", finding, is_refused=True)
        if split.too_long.rows:
            cut = f"cut there, {split.cut.rows:,} would lose the end of their last answer and {split.lost:,} all of it"
            what = f"refused: over data.max_length = {report.max_length} ({cut})"
            yield _Line(name, what, split.too_long, is_refused=True)
    overlaps = {
        "in held-out too, prompt and answer": report.same_conversation,
        "with the prompt of a held-out row, and another answer": report.same_prompt,
    }
    for what, finding in overlaps.items():
        yield _Line("train", what, finding)
    for name, split in splits.items():
        yield _Line(name, "the same as one before", split.duplicates)
        yield _Line(name, "without an end that is learnt: what they teach does not stop", split.without_end)
        yield _Line(name, "with a second BOS", split.double_bos)
        yield _Line(name, "with a special token written out in a message", split.special_text)


def _show_line(line: _Line) -> None:
    finding = line.finding
    style = "bold red" if line.is_refused else "yellow"
    out.print(
        f"\n[{style}]{line.split}[/]: {escape(f'{finding.rows:,} {_rows(finding.rows)} {line.what}')}",
        soft_wrap=True,
        highlight=False,
    )
    for place in finding.first:
        out.print(f"  {escape(place)}", soft_wrap=True, highlight=False)
    if finding.rows > len(finding.first):
        out.print(f"  and {finding.rows - len(finding.first):,} more", highlight=False)
    if finding.hint:
        out.print(f"  [cyan]hint[/]: {escape(finding.hint)}", soft_wrap=True, highlight=False)


def _rows(count: int) -> str:
    return "row" if count == 1 else "rows"
