"""The commands of a page, in the order in which a reader types them.

What a page promises, and `docs_walk.py` holds it to:

- a block that is indented by four spaces is typed, line by line; `\\` and a here-document go over several lines.
- `# leave it running` behind a command: it has a terminal of its own, until `# Ctrl-C in its terminal` stands alone.
- `# exit 1` behind a command: it ends so, and that is what is to be seen. Without it a command ends with 0.
- a fenced block of `text` behind commands is what the last of them prints: each of its lines stands for another line of
  the output, with all of its words. Of a word with `...` or `@` only what stands before that counts; any other word
  with a digit is free. Of what is left running the block is what it says when it is ready.
- fenced blocks of another kind are files or programs to be read, not typed.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

ROOT = Path(__file__).parents[2]
WALKED = (
    ROOT / "docs/getting-started.md",
    *(
        ROOT / f"docs/jobs/{name}.md"
        for name in ("data", "train", "serve-merged", "serve-adapters", "prove", "measure", "gate")
    ),
)
"""In this order, in one folder."""
_CTRL_C = "# Ctrl-C in its terminal"
_RUNNING = "leave it running"
_COMMENT = re.compile(r"\s+#\s+(.*)$")
_HERE = re.compile(r"<<-?\s*'?(\w+)'?")
_MARKS = ".,:;()"
_BEGINS = re.compile(r".*?@|.*?(?=\.\.\.)")


Kind = Literal["run", "leave running", "interrupt"]


class Step(NamedTuple):
    """One command as it is printed, without its remark; what it has to end with, and to say."""

    page: str
    line: int
    command: str
    kind: Kind = "run"
    exits: tuple[int, ...] = (0,)
    shown: tuple[str, ...] = ()

    def missing(self, printed: str) -> list[str]:
        """The shown lines that no printed line has all words of; a printed line is good for one of them."""
        lines = [_words(line) for line in printed.splitlines()]
        fitting = [[at for at, words in enumerate(lines) if _stands_in(line, words)] for line in self.shown]
        taken: dict[int, int] = {}  # printed line -> shown line

        def place(shown: int, tried: set[int]) -> bool:
            """In a line that is free, or whose holder finds another (Kuhn's augmenting paths)."""
            for at in fitting[shown]:
                if at not in tried:
                    tried.add(at)
                    if at not in taken or place(taken[at], tried):
                        taken[at] = shown
                        return True
            return False

        return [line for shown, line in enumerate(self.shown) if not place(shown, set())]

    def at(self, pages_port: int, port: int) -> Step:
        """The same, of a server that listens elsewhere."""
        before, now = f":{pages_port}", f":{port}"
        shown = tuple(line.replace(before, now) for line in self.shown)
        return self._replace(command=self.command.replace(before, now), shown=shown)


def steps(page: Path) -> list[Step]:
    """All of a page.

    Raises:
        ValueError: something is left running, and the page does not say how it shows that it is ready.

    """
    found: list[Step] = []
    for start, block in _blocks(page.read_text(encoding="utf-8").splitlines()):
        if block[0].startswith("```"):
            if block[0] == "```text" and found:
                found[-1] = found[-1]._replace(shown=tuple(line for line in block[1:-1] if line.strip()))
            continue
        found += _typed(page, start, [line[4:] for line in block])
    for step in found:
        if step.kind == "leave running" and not step.shown:
            raise ValueError(f"{step.page}:{step.line}: no block of text says when it is ready")
    return found


def _blocks(lines: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """(number of the first line, lines) of each fenced block with its fences, and of each indented one."""
    at = 0
    while at < len(lines):
        start = at
        if lines[at].startswith("```"):
            at += 1
            while not lines[at].startswith("```"):
                at += 1
            at += 1
        elif lines[at].startswith("    "):
            while at < len(lines) and (lines[at].startswith("    ") or not lines[at].strip()):
                at += 1
        else:
            at += 1
            continue
        yield start + 1, list(lines[start:at])


def _typed(page: Path, start: int, lines: Sequence[str]) -> Iterator[Step]:
    name = page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name
    at = 0
    while at < len(lines):
        first = at
        command, remark = _without_remark(lines[at])
        at += 1
        while _goes_on(command):
            more, remark = (lines[at], "") if _HERE.search(command) else _without_remark(lines[at])
            command = f"{command[:-1].rstrip()} {more.strip()}" if command.endswith("\\") else f"{command}\n{more}"
            at += 1
        if lines[first].strip() == _CTRL_C:
            yield Step(name, start + first, _CTRL_C, "interrupt")
        elif command.strip():
            kind: Kind = "leave running" if remark.startswith(_RUNNING) else "run"
            yield Step(name, start + first, command, kind, _exits(remark))


def _goes_on(command: str) -> bool:
    """Behind a backslash, in a here-document, or inside quotes."""
    if here := _HERE.search(command):
        return command.splitlines()[-1].strip() != here[1]
    if command.endswith("\\"):
        return True
    try:
        shlex.split(command)
    except ValueError:
        return True
    return False


def _exits(remark: str) -> tuple[int, ...]:
    """`exit 0, 1 or 3` as numbers."""
    said = re.match(r"exit ([\d, or]+)", remark)
    return tuple(map(int, re.findall(r"\d+", said[1]))) if said else (0,)


def _without_remark(line: str) -> tuple[str, str]:
    """(what is typed, the remark behind it); a line that is all remark types nothing."""
    if line.lstrip().startswith("#"):
        return "", line.strip()
    found = _COMMENT.search(line)
    return (line[: found.start()], found[1]) if found else (line.rstrip(), "")


def _stands_in(shown: str, words: set[str]) -> bool:
    """Whether all that is demanded of a shown line is among a printed one's words."""
    for word in shown.split():
        if begins := _BEGINS.match(word):
            fits = any(other.startswith(begins[0].lstrip(_MARKS)) for other in words)
        else:
            fits = bool(re.search(r"\d", word)) or word.strip(_MARKS) in words
        if not fits:
            return False
    return True


def _words(line: str) -> set[str]:
    return {word.strip(_MARKS) for word in line.split()}
