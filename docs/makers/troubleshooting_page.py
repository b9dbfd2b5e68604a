"""docs/troubleshooting.md: what stands above `MARK` is written by hand, all messages below are read from the source."""

from __future__ import annotations

import inspect
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

import areas
import raised

PAGE = Path(__file__).parents[1] / "troubleshooting.md"
MARK = "<!-- from here on made by `make reference` -->\n"
_ADVICE = Path(__file__).with_name("advice.toml")
_PLACEHOLDER = re.compile(r"<[^<>\s]+>")


def page() -> str:
    """The page: its own head, then the kinds, then every message by area.

    Raises:
        LookupError: a message says nobody what to do, or an advice is for a message that is gone.

    """
    head, mark, _ = PAGE.read_text(encoding="utf-8").partition(MARK)
    assert mark, f"{PAGE} has lost the line {MARK}"
    advice: dict[str, str] = tomllib.loads(_ADVICE.read_text(encoding="utf-8"))
    found = raised.collect()
    gone = advice.keys() - {one.text for one in found}
    if gone:
        raise LookupError(f"advice.toml: no error says {sorted(gone)}")
    sections = [_section(area, found, advice) for area in areas.AREAS]
    return f"{head}{mark}\n{_kinds()}\n" + "\n".join(sections)


def _kinds() -> str:
    """What the classes of `core/errors.py` are, and how a shell sees them."""
    rows = []
    for kind in raised.KINDS.values():
        about = " ".join(inspect.cleandoc(kind.__doc__ or "").split())
        rows.append(f"| `{kind.__name__}` | {kind.exit_code.value} | {_cell(about)} |")
    return "## Kinds\n\n| kind | exit code | |\n|---|---|---|\n" + "\n".join(rows) + "\n"


def _section(area: areas.Area, found: list[raised.Found], advice: Mapping[str, str]) -> str:
    rows = []
    for one in found:
        if areas.shown_in(one.place, one.kind) is not area:
            continue
        what_to_do = advice.get(one.text) or one.hint
        if not (what_to_do or area.is_enough):
            raise LookupError(f"{one.place}: {one.text!r} has no hint: advice.toml can say what to do")
        rows.append((one.kind, f"| {_message(one.text)} | {_cell(what_to_do)} | {one.kind} |"))
    lines = [line for _, line in sorted(rows, key=lambda row: row[0])]  # in the order of the files, kind by kind
    return (
        f"## {area.title}\n\n{area.about}\n\n| message | what to do | kind |\n|---|---|---|\n" + "\n".join(lines) + "\n"
    )


def _message(text: str) -> str:
    """As code, in which `<name>` is shown as it is."""
    fence = "``" if "`" in text else "`"
    space = " " if fence == "``" else ""
    return f"{fence}{space}{text}{space}{fence}".replace("|", "\\|")


def _cell(text: str) -> str:
    """Outside of code `<name>` would be HTML."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()).replace("|", "\\|"))
    return "".join(
        part if part.startswith("`") else _PLACEHOLDER.sub(lambda found: f"`{found[0]}`", part) for part in parts
    )
