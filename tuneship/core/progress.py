"""How long work tells a person how far it is, without knowing whether that person sits at a terminal.

    say("loading the base")                      # one sentence
    progress("train", done=12, total=40, detail="loss 0.83")

The default sink prints plain lines to stderr; the command line puts a progress bar there on a terminal, and a stage's
process sends both through a pipe to its parent.
"""

from __future__ import annotations

import json
import math
import sys
import time
from typing import NamedTuple, Protocol

_MARK = "\x1etuneship "


class Event(NamedTuple):
    """A sentence (`total` is 0), or how far `label` is."""

    label: str
    done: float = 0
    total: float = 0
    detail: str = ""


class Sink(Protocol):
    """Where events go."""

    def show(self, event: Event) -> None:
        """Show one event."""


class PlainLines:
    """To stderr: every sentence, and progress at most every `interval_s` and at its end."""

    def __init__(self, interval_s: float = 5) -> None:
        self._interval_s = interval_s
        self._shown_at: dict[str, float] = {}

    def show(self, event: Event) -> None:
        """Print it, unless it is progress that was printed a moment ago."""
        if not event.total:
            print(event.label, file=sys.stderr, flush=True)
            return
        now = time.monotonic()
        shown_at = self._shown_at.get(event.label, -math.inf)  # not 0: the clock may have started with the machine
        if event.done < event.total and now - shown_at < self._interval_s:
            return
        self._shown_at[event.label] = now
        print(f"{event.label}  {event.done:g}/{event.total:g}  {event.detail}".rstrip(), file=sys.stderr, flush=True)


class ToParent:
    """As marked lines on stdout, for `parse` in the parent process."""

    def show(self, event: Event) -> None:
        """Write one marked line."""
        print(_MARK + json.dumps(event), flush=True)


def parse(line: str) -> Event | None:
    """The event in a child's output line; None for ordinary output."""
    if not line.startswith(_MARK):
        return None
    try:
        return Event(*json.loads(line.removeprefix(_MARK)))
    except (json.JSONDecodeError, TypeError):  # two threads of the child wrote into one line
        return None


class _Current:
    sink: Sink = PlainLines()


def use(sink: Sink) -> None:
    """Send events to `sink` from now on."""
    _Current.sink = sink


def say(sentence: str) -> None:
    """Tell the user one thing."""
    _Current.sink.show(Event(sentence))


def show(event: Event) -> None:
    """Pass on an event of a child."""
    _Current.sink.show(event)


def progress(label: str, done: float, total: float, detail: str = "") -> None:
    """Tell the user how far `label` is."""
    _Current.sink.show(Event(label, done, max(total, 1), detail))
