"""`tuneship adapters`: the verbs that change what a running server answers with."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from json import dumps
from pathlib import Path
from typing import Any
from urllib.parse import quote


def load(path: Path, *, alias: str = "", weight: str = "", pin: bool = False, url: str = "") -> None:
    """Bring an adapter into the running server: checked, copied, loaded and verified; nothing is lost if it fails.

    Parameters
    ----------
    path
        Its directory, or that of the run that trained it, on the server's machine.
    alias
        What clients call it (default: its own name). The first version of an alias answers at once, a later one when
        it gets weight or is promoted.
    weight
        Share of the alias's requests, such as 5% or 0.05; 100% promotes it.
    pin
        Keep it in the engine's slots whatever else is asked for.
    url
        Which server, if several run.

    """
    from tuneship.core import rundir  # noqa: PLC0415 - loads pydantic
    from tuneship.core.progress import say  # noqa: PLC0415

    body = {"path": str(rundir.made(path.absolute(), "train")), "alias": alias, "weight": _share(weight), "pinned": pin}
    loaded = _ask("POST", "/admin/adapters", url, body)
    for remark in loaded.get("remarks", ()):
        say(f"warning: {remark}")
    _show([loaded])


def list_(*, json: bool = False, url: str = "") -> None:
    """Show the versions that the running server has, and what each of them answers.

    Parameters
    ----------
    json
        For programs: a list of objects.
    url
        Which server, if several run.

    """
    found = [version for version in _ask("GET", "/admin/adapters", url) if version["state"] != "unloaded"]
    if json:
        print(dumps(found, indent=1))
    else:
        _show(found)


def promote(name: str, *, url: str = "") -> None:
    """Let a version answer all requests to its alias; the one before stays loaded, for `rollback`.

    Parameters
    ----------
    name
        alias@id, or an alias that has one canary or one loaded version beside the live one.
    url
        Which server, if several run.

    """
    _show([_ask("POST", f"/admin/adapters/{_quoted(name)}/promote", url)])


def weigh(name: str, weight: str, *, url: str = "") -> None:
    """Let a version answer a share of the requests to its alias, as a canary.

    Parameters
    ----------
    name
        alias@id, or an alias that has one canary or one loaded version beside the live one.
    weight
        Such as 5% or 0.05; 0 takes it away, 100% promotes.
    url
        Which server, if several run.

    """
    _show([_ask("POST", f"/admin/adapters/{_quoted(name)}/weight", url, {"weight": _share(weight)})])


def rollback(alias: str, *, url: str = "") -> None:
    """Take the weight from an alias's canaries; where there are none, let the version before answer again.

    Parameters
    ----------
    alias
        Of which.
    url
        Which server, if several run.

    """
    _show([_ask("POST", f"/admin/adapters/{_quoted(alias)}/rollback", url)])


def unload(name: str, *, timeout: float | None = None, url: str = "", state: Path | None = None) -> None:
    """Take a version, or an alias with all its versions, out of the server; it answers nobody new from now on.

    Parameters
    ----------
    name
        alias@id, or an alias.
    timeout
        Seconds to wait for its requests in flight (default: 60).
    url
        Which server, if several run.
    state
        Out of this folder, the state of a server that does not run: for a version that keeps it from starting.

    """
    if state:
        from tuneship.core.errors import RecipeError  # noqa: PLC0415 - `--help` starts without all of this
        from tuneship.serve.state import take_out  # noqa: PLC0415

        if url or timeout is not None:
            option = "--url" if url else "--timeout"
            raise RecipeError(
                f"{option} is about a server that runs, and --state about one that does not",
                hint=f"leave out {option}, or --state",
            )

        gone = take_out(state, name)
        _show([version._asdict() | {"version": version.name, "in_flight": 0} for version in gone])
    else:
        body = {} if timeout is None else {"timeout_s": timeout}
        _show(_ask("POST", f"/admin/adapters/{_quoted(name)}/unload", url, body))


def history(alias: str = "", *, limit: int = 20, url: str = "") -> None:
    """Show who changed what, the latest first.

    Parameters
    ----------
    alias
        Of this one alone.
    limit
        How many changes.
    url
        Which server, if several run.

    """
    events = _ask("GET", f"/admin/history?alias={_quoted(alias)}&limit={limit}", url)
    columns = ("at", "verb", "version", "actor", "detail")
    _table(columns, [[event[column] for column in columns] for event in events])


def _quoted(name: str) -> str:
    """A name as one part of a path, whatever was typed."""
    return quote(name, safe="@")


def _share(text: str) -> float | None:
    """`5%` or `0.05` as a number.

    Raises:
        RecipeError: it is no share.

    """
    from tuneship.core.errors import RecipeError  # noqa: PLC0415 - `--help` starts without all of this

    if not text:
        return None
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise RecipeError(f"weight = {text!r} is no share", hint="5%, or 0.05")
    return value


def _ask(method: str, path: str, url: str, body: dict[str, Any] | None = None) -> Any:
    """What the admin side of the server at `url` answers."""
    from tuneship.serve import running  # noqa: PLC0415
    from tuneship.serve.admin_client import ask  # noqa: PLC0415

    return ask(running.find(url), method, path, body)


def _show(versions: Sequence[dict[str, Any]]) -> None:
    columns = ("version", "state", "weight", "verified", "in flight")
    _table(columns, [_row(version) for version in versions])


def _row(version: dict[str, Any]) -> tuple[str, ...]:
    state = f"{version['state']}{', pinned' if version['pinned'] else ''}"
    return version["version"], state, f"{version['weight']:.0%}", version["verified"], str(version["in_flight"])


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table(*columns, box=None)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160).print(table, highlight=False, markup=False)
