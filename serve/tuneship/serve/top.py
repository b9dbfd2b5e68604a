"""`tuneship top`: a running server on one screen, from its `/admin/status`, once a second."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from tuneship.serve.running import Running
    from tuneship.serve.status import Status

_WINDOW_S = 60.0
_PATIENCE_S = 5.0
_PIPE_WIDTH = 160


def top(*, url: str = "", once: bool = False) -> None:
    """Show a running server: its engine, and what every version does; Ctrl-C ends it.

    Parameters
    ----------
    url
        Which server, if several run: its own or its admin address.
    once
        Print one table and end, as without a terminal.

    """
    from rich.console import Console  # noqa: PLC0415 - `--help` starts without all of this

    from tuneship.serve import running  # noqa: PLC0415
    from tuneship.serve.screen import Sample, render  # noqa: PLC0415

    def ask() -> Status:
        return fetch(running.find(url))  # each time: it may have been started again, elsewhere

    console = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False)
    if once or not console.is_terminal:
        console.print(render([Sample(time.monotonic(), ask())]))
        return
    with contextlib.suppress(KeyboardInterrupt):
        watch(ask, console)


def fetch(server: Running) -> Status:
    """Ask `server` how it is.

    Raises:
        EndpointError: it does not answer, or not as a server of ours.

    """
    from pydantic import ValidationError  # noqa: PLC0415

    from tuneship.serve.admin_client import ask, silent  # noqa: PLC0415
    from tuneship.serve.status import Status  # noqa: PLC0415

    try:
        return Status.model_validate(ask(server, "GET", "/admin/status", patience_s=_PATIENCE_S))
    except ValidationError:
        raise silent(server, "its status cannot be read") from None


def watch(ask: Callable[[], Status], console: Console, every_s: float = 1.0) -> None:
    """Draw until interrupted. A server that is gone leaves its last figures and a line that says so.

    Raises:
        EndpointError: the first time, there is none.

    """
    from rich.live import Live  # noqa: PLC0415

    from tuneship.core.errors import EndpointError  # noqa: PLC0415
    from tuneship.serve.screen import Sample, render  # noqa: PLC0415

    samples = deque([Sample(time.monotonic(), ask())])
    with Live(render(samples), console=console, screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(every_s)
            problem = ""
            try:
                samples.append(Sample(time.monotonic(), ask()))
            except EndpointError as error:
                problem = error.message
            while samples[-1].at - samples[0].at > _WINDOW_S:
                samples.popleft()
            live.update(render(samples, problem), refresh=True)
