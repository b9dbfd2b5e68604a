"""The one place where an exception becomes words on stderr and an exit code."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import FrameType

from rich.markup import escape

from tuneship.cli.console import talk
from tuneship.core import extras
from tuneship.core.errors import ExitCode, TuneshipError

_DISK_FULL = 28


def run(command: Callable[[], object]) -> None:
    """Call `command` and exit the process: expected failures print no traceback."""
    signal.signal(signal.SIGTERM, _unwind)
    try:
        command()
    except TuneshipError as error:
        report(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        talk.print("\ninterrupted")
        sys.exit(ExitCode.INTERRUPTED)
    except OSError as error:
        if error.errno != _DISK_FULL:
            raise
        report(
            TuneshipError(f"the disk is full: {error.filename or 'no space left'}", hint="free some and run it again")
        )
        sys.exit(ExitCode.FAILED)
    except ModuleNotFoundError as error:
        lacking = extras.lacking(error)
        if lacking is None:
            raise
        report(lacking)
        sys.exit(ExitCode.FAILED)
    sys.exit(ExitCode.OK)


def report(error: TuneshipError) -> None:
    """Print `error:` and, a line below, `hint:`."""
    talk.print(f"[bold red]error[/]: {escape(error.message)}", soft_wrap=True)
    if error.hint:
        talk.print(f"\n[bold cyan]hint[/]: {escape(error.hint)}", soft_wrap=True)


def _unwind(_signal: int, _frame: FrameType | None) -> None:
    """SIGTERM leaves through the context managers, which stop children and remove drafts."""
    sys.exit(128 + signal.SIGTERM)
