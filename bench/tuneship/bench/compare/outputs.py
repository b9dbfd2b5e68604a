"""Verdicts for a CI job: JUnit XML for its test page, Markdown for its summary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree as ET

from tuneship.bench.compare.again import is_command
from tuneship.core.files import write_atomic
from tuneship.core.report import Comparison

COLUMNS = ("metric", "baseline", "candidate", "worse by", "interval", "detectable", "verdict")


def write_junit(rows: Sequence[Comparison], path: Path) -> None:
    """One test case a metric: `regressed` is a failure, `cannot tell` is an error, so that it never looks passed."""
    kinds = {"regressed": "failure", "cannot tell": "error"}
    counts = {f"{kind}s": str(sum(row.verdict == verdict for row in rows)) for verdict, kind in kinds.items()}
    suite = ET.Element("testsuite", {"name": "tuneship bench compare", "tests": str(len(rows)), **counts})
    for row in rows:
        case = ET.SubElement(suite, "testcase", classname="tuneship.compare", name=row.metric)
        if row.verdict in kinds:
            ET.SubElement(case, kinds[row.verdict], message=row.reason or row.verdict).text = _sentence(row)
    write_atomic(path, ET.tostring(suite, encoding="unicode", xml_declaration=True))


def write_markdown(rows: Sequence[Comparison], path: Path) -> None:
    """One line a metric."""
    lines = [
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in cells(row)) + " |" for row in rows),
    ]
    write_atomic(path, "\n".join(lines) + "\n")


def cells(row: Comparison, *, brief: bool = False) -> tuple[str, ...]:
    """What `COLUMNS` names; two stored reports have no interval, so how much worse is their plain ratio.

    A `brief` verdict leaves out a command: on a terminal one decides all (`again.decide`).
    """
    interval = f"{_effect(row, row.ci[0])} .. {_effect(row, row.ci[1])}" if row.ci else "-"
    plain = f"x {row.ratio:.3f}" if row.ratio is not None else "-"
    worse_by = plain if row.worse_by is None else _effect(row, row.worse_by)
    known = (worse_by, interval, _effect(row, row.detectable))
    return (row.metric, _number(row.a), _number(row.b), *known, _sentence(row, brief=brief))


def _sentence(row: Comparison, *, brief: bool = False) -> str:
    parts = f"{row.verdict}: {row.reason}" if row.reason else row.verdict
    left_out = not row.next_step or (brief and is_command(row.next_step))
    return parts if left_out else f"{parts} (to decide: {row.next_step})"


def _effect(row: Comparison, value: float | None) -> str:
    if value is None:
        return "-"
    scaled = {"ratio": f"{value:+.1%}", "points": f"{value * 100:+.1f} points", "nats": f"{value:+.4f} nats"}
    return scaled[row.unit]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
