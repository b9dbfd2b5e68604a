"""The servers of this machine and user: where their admin verbs listen, and the key for them.

    with announced(Running(url, admin_url, admin_key)): ...      # while a server runs
    running = find()                                             # the only one, or the one at `url`

One file each in the cache, readable by its owner alone, named by the server's process; one whose process is gone,
or began after it was written, is somebody's who was killed, and is removed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from tuneship.core.cache import cache_dir
from tuneship.core.errors import EndpointError

ADMIN_KEY_VARIABLE = "TUNESHIP_ADMIN_KEY"
_CLOCK_S = 2.0
"""A process's start is known to a tick, from a clock that may have been set since."""


class Running(BaseModel):
    """A server that can be told what to do."""

    model_config = ConfigDict(frozen=True)

    url: str
    admin_url: str
    admin_key: str
    mode: str = "adapters"


@contextlib.contextmanager
def announced(server: Running) -> Iterator[None]:
    """Let this user's verbs find `server` during the block."""
    folder = _folder()
    folder.mkdir(mode=0o700, exist_ok=True)
    file = folder / f"{os.getpid()}.json"
    file.unlink(missing_ok=True)
    with os.fdopen(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="utf-8") as opened:
        opened.write(server.model_dump_json(indent=1))
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def find(url: str = "") -> Running:
    """The server at `url` (its own or its admin address); without one, the only server that runs.

    Raises:
        EndpointError: there is none, or several and none was named.

    """
    servers = _all()
    found = [server for server in servers if url.rstrip("/") in {server.url, server.admin_url}] if url else servers
    if len(found) == 1:
        return found[0]
    if url:
        key = os.environ.get(ADMIN_KEY_VARIABLE)
        if key:  # somebody else's, or another machine's behind a tunnel
            return Running(url=url.rstrip("/"), admin_url=url.rstrip("/"), admin_key=key)
        raise EndpointError(
            f"no server of yours runs at {url}", hint=f"set {ADMIN_KEY_VARIABLE}, and give the admin address as --url"
        )
    if not found:
        raise EndpointError("no server is running", hint="tuneship serve BASE --adapters DIRECTORY starts one")
    listed = ", ".join(server.url for server in found)
    raise EndpointError(f"{len(found)} servers are running: {listed}", hint="say which with --url")


def mode(url: str) -> str:
    """What the server at `url` serves, `adapters` or one model, if it is one of this machine and user; else empty."""
    return next((server.mode for server in _all() if server.url == url.rstrip("/")), "")


def _all() -> list[Running]:
    found = []
    for file in sorted(_folder().glob("*.json")):
        if not _is_its_servers(file):
            file.unlink(missing_ok=True)
            continue
        with contextlib.suppress(OSError, ValidationError):
            found.append(Running.model_validate_json(file.read_bytes()))
    return found


def _is_its_servers(file: Path) -> bool:
    """Whether the process that it is named by wrote it: numbers of processes are used again."""
    try:
        return psutil.Process(int(file.stem)).create_time() <= file.stat().st_mtime + _CLOCK_S
    except (ValueError, OSError, psutil.NoSuchProcess):
        return False


def _folder() -> Path:
    return cache_dir() / "servers"
