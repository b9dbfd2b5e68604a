"""What a person sees: data goes to stdout, talk to stderr, a progress bar where there is a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from tuneship.core.progress import Event

out = Console()
talk = Console(stderr=True, highlight=False)


class ProgressBars:
    """One bar per label on the terminal; sentences are printed above them."""

    def __init__(self) -> None:
        self._bars = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}"),
            console=talk,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}

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
