"""A real terminal session: what a command writes to a pty of so many columns, and a picture of where it ended.

It is kept as asciicast v2 (a header, then `[seconds, "o", text]` a line), which asciinema plays and `picture` draws.
"""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import io
import itertools
import json
import os
import pty
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyte  # type: ignore[import-not-found]  # in the environment of pictures.py alone
from rich.console import Console
from rich.style import Style
from rich.terminal_theme import TerminalTheme
from rich.text import Text

ROWS = 40
"""Of the terminal; what scrolls off its top stays in the picture."""
ENVIRONMENT = {"TERM": "xterm-256color", "COLORTERM": "truecolor", "LANG": "C.UTF-8"}
THEME = TerminalTheme(
    background=(22, 27, 34),
    foreground=(214, 220, 228),
    normal=[
        *((72, 79, 88), (255, 123, 114), (86, 211, 100), (227, 179, 65)),
        *((121, 192, 255), (210, 168, 255), (86, 212, 221), (214, 220, 228)),
    ],
    bright=[
        *((139, 148, 158), (255, 161, 152), (126, 231, 135), (242, 204, 96)),
        *((165, 214, 255), (226, 197, 255), (179, 240, 255), (240, 246, 252)),
    ],
)
# rich's own template fetches a font; the reader's terminal font is as good. No script, nothing from elsewhere.
SVG = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", "Liberation Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px;
}}
.{unique_id}-title {{ font: 15px ui-sans-serif, Helvetica, Arial, sans-serif; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
</clipPath>{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def record(command: Sequence[str], cast: Path, cwd: Path, columns: int, *, seconds: float = 0) -> None:
    """Run a command to its end, or for so many seconds and then with Ctrl-C; write what the terminal got.

    Raises `RuntimeError` when it fails, or ends before its time; then nothing is written.
    """
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))
    child = subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, **ENVIRONMENT},
        stdin=follower,
        stdout=follower,
        stderr=follower,
        start_new_session=True,
    )
    os.close(follower)
    begun, decoder = time.monotonic(), codecs.getincrementaldecoder("utf-8")("replace")
    unfinished, ended = cast.with_suffix(".part"), False
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(json.dumps({"version": 2, "width": columns, "height": ROWS}) + "\n")
            while not seconds or time.monotonic() - begun < seconds:
                try:
                    read = os.read(leader, 65536)
                except OSError:
                    ended = True
                    break
                file.write(json.dumps([round(time.monotonic() - begun, 3), "o", decoder.decode(read)]) + "\n")
                file.flush()
        if not ended:
            child.send_signal(signal.SIGINT)
        code = child.wait(60)
    finally:
        os.close(leader)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    too_early, failed = bool(seconds) and ended, not seconds and code
    if too_early or failed:
        raise RuntimeError(f"{' '.join(command)} ended with {code}: see {unfinished}")
    unfinished.rename(cast)


def picture(cast: Path, title: str, typed: str) -> str:
    """The SVG of what the terminal showed at the end, below the command as it was typed."""
    header, *events = (json.loads(line) for line in cast.read_text(encoding="utf-8").splitlines())
    screen = pyte.HistoryScreen(header["width"], header["height"], history=10_000)
    stream = pyte.Stream(screen)
    for _, _, text in events:
        stream.feed(text.replace("\x1b[2m", "\x1b[90m"))  # pyte knows no faint: grey
    lines = [*screen.history.top, *(screen.buffer[row] for row in range(screen.lines))]
    shown = [_line(line, screen.columns) for line in lines]
    while shown and not shown[-1].plain:
        shown.pop()
    console = Console(record=True, width=header["width"], file=io.StringIO(), force_terminal=True)
    console.print(Text.assemble(("$ ", "green"), (typed, "bold")))
    for line in shown:
        console.print(line, no_wrap=True, overflow="crop")
    return console.export_svg(title=title, theme=THEME, code_format=SVG, unique_id="tuneship")


def _line(cells: Mapping[int, pyte.screens.Char], columns: int) -> Text:
    text = Text()
    styled = ((_style(cells[column]), cells[column].data) for column in range(columns))
    for style, run in itertools.groupby(styled, key=lambda each: each[0]):
        text.append("".join(data for _, data in run), style)
    text.rstrip()
    return text


def _style(cell: pyte.screens.Char) -> Style:
    return Style(color=_colour(cell.fg), bgcolor=_colour(cell.bg), bold=cell.bold, reverse=cell.reverse)


def _colour(name: str) -> str | None:
    """Return pyte's name of a colour as rich calls it."""
    if name == "default":
        return None
    if len(name) == 6 and set(name) <= set("0123456789abcdef"):
        return f"#{name}"
    plain = name.removeprefix("bright").replace("brown", "yellow")
    return f"bright_{plain}" if name.startswith("bright") else plain
