"""What a person sees: data goes to stdout, talk to stderr, a progress bar where there is a terminal."""

from __future__ import annotations

import sys
from functools import cached_property
from typing import TYPE_CHECKING

from rich.console import Console

from tuneship.core.progress import Event

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_PIPE_WIDTH = 140

# A pipe has no width: do not cut figures to 80 columns there.
out = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)
talk = Console(stderr=True, highlight=False)


class ProgressBars:
    """One bar per label on the terminal; sentences are printed above them."""

    def __init__(self) -> None:
        self._tasks: dict[str, TaskID] = {}

    @cached_property
    def _bars(self) -> Progress:
        from rich import progress  # noqa: PLC0415 - a quarter of the time that `--help` takes

        return progress.Progress(
            progress.TextColumn("{task.description:<10}"),
            progress.BarColumn(bar_width=28),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[detail]}"),
            console=talk,
            transient=True,
        )

    def show(self, event: Event) -> None:
        """Draw one event."""
        if not event.total:
            talk.print(event.label, markup=False)
            return
        if not self._tasks:
            self._bars.start()
        if event.label not in self._tasks:
            self._tasks[event.label] = self._bars.add_task(event.label, total=event.total, detail="")
        self._bars.update(self._tasks[event.label], completed=event.done, detail=event.detail)
        if event.done >= event.total:
            self._bars.remove_task(self._tasks.pop(event.label))
            if not self._tasks:
                self._bars.stop()
