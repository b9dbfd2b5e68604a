"""What is not installed: each room's libraries are an extra of the package.

extras.require("train", "serve")     # before hours of training: is there what comes after it?
extras.lacking(error)                # a library that was not there when a verb's room was imported
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from types import TracebackType

from tuneship.core.errors import TuneshipError

_SIGNS = {"train": "trl", "serve": "sglang", "bench": "altair"}
"""What only this room's extra brings."""


def require(*rooms: str) -> None:
    """See that the libraries of all `rooms` are installed.

    Raises:
        TuneshipError: some are not; with the line that installs them all.

    """
    missing = [room for room in rooms if find_spec(_SIGNS[room]) is None]
    if missing:
        raise _needs(f"this needs {' and '.join(_SIGNS[room] for room in missing)}", ",".join(missing))


def require_of(module: str) -> None:
    """See that `module`'s room can be imported (errors as in `require`); another package's modules always pass."""
    room = _room(module)
    if room:
        require(room)


def lacking(error: ModuleNotFoundError) -> TuneshipError | None:
    """What to say of `error`; None where no extra is to blame: it is a bug of ours, or of the installation."""
    modules = list(_modules(error.__traceback__))
    room = next((room for room in map(_room, reversed(modules)) if room), "")
    if not room or not error.name or error.name.partition(".")[0] == "tuneship":
        return None
    return _needs(f"this verb needs {error.name}", room)


def _needs(what: str, extras: str) -> TuneshipError:
    return TuneshipError(what, hint=f"pip install 'tuneship[{extras}]'")


def _room(module: str) -> str:
    """The room that `module` is of; empty for the spine and for others' code."""
    package, _, rest = module.partition(".")
    room = rest.partition(".")[0]
    return room if package == "tuneship" and room in _SIGNS else ""


def _modules(traceback: TracebackType | None) -> Iterator[str]:
    while traceback:
        yield str(traceback.tb_frame.f_globals.get("__name__", ""))
        traceback = traceback.tb_next
