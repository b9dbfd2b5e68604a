"""How a verb is run in a container.

    plan_run(("serve", "runs/x/artifacts/merged-3fa9c1d20b77"), Wishes()).words()

A container works in the caller's folder, as the caller, at the same path: what it writes belongs to whoever started it,
and a recipe or a run directory means the same inside and outside.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from tuneship.cli.containers.words import PORT, Bind, Role, Run
from tuneship.core.cache import cache_dir, keys_file, state_dir
from tuneship.core.errors import PreflightError, TuneshipError

ROLES: Mapping[str, Role] = {
    **dict.fromkeys(("fetch", "data", "train", "merge", "base"), "train"),
    "serve": "serve",
}
"""Which image answers a verb."""
_KEY = "TUNESHIP_API_KEY"
_PASSED = (_KEY, "HF_TOKEN", "HF_HUB_OFFLINE", "HF_ENDPOINT")
"""Named on the command line, never with their values."""


class Wishes(NamedTuple):
    """What the caller may choose. `gpus`: none, all, or ids with commas between them."""

    image: str = ""
    host: str = "127.0.0.1"
    port: int = PORT
    gpus: str = "none"
    mounts: tuple[Path, ...] = ()
    env: tuple[str, ...] = ()


def plan_run(command: Sequence[str], wishes: Wishes) -> Run:
    """Say how `tuneship COMMAND` is run in its image, from this folder.

    Raises:
        TuneshipError: no image answers this verb, or this folder cannot be mounted.
        PreflightError: a server without an API key.

    """
    role = _role(command)
    serving = role == "serve"
    folder = Path.cwd()
    if folder == Path(folder.anchor):
        raise TuneshipError(f"{folder} cannot be mounted into a container", hint="cd into the folder of your runs")
    home, hub = cache_dir() / "container", Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    settings = {
        "HOME": str(home),
        "TUNESHIP_CACHE": str(cache_dir()),
        "TUNESHIP_STATE": str(state_dir()),
        "HF_HOME": str(hub),
    }
    binds = [Bind(folder, serving), *(Bind(path, False) for path in (cache_dir(), state_dir(), hub))]
    binds += [Bind(path.resolve(), True) for path in wishes.mounts]
    binds += [Bind(path, True) for path in _named(command, folder)] if serving else []
    passed = tuple(name for name in (*_PASSED, *wishes.env) if name in os.environ)
    if serving:
        keys = keys_file()
        if keys.is_file():  # its folder: the file is replaced when a key is added
            binds.append(Bind(keys.parent.resolve(), True))
            settings["TUNESHIP_KEYS"] = str(keys.parent.resolve() / keys.name)
        elif _KEY not in passed:
            raise PreflightError(
                "a server in a container is reached through its network, and there is no API key",
                hint=f"export {_KEY}=$(openssl rand -hex 24), or tuneship keys add NAME",
            )
    for path in (home, hub):
        path.mkdir(parents=True, exist_ok=True)
    return Run(
        image=wishes.image or image_of(role),
        command=(*command, *(("--host", "0.0.0.0", "--port", str(PORT)) if serving else ())),  # noqa: S104 - inside
        user=f"{os.getuid()}:{os.getgid()}",
        folder=folder,
        binds=_each_once(binds),
        settings=settings,
        passed=passed,
        publish=(wishes.host, wishes.port) if serving else None,
        gpus=_gpus(wishes.gpus),
    )


def image_of(role: Role) -> str:
    """Its name, unless the caller gives another."""
    return f"tuneship-{role}"


def _role(command: Sequence[str]) -> Role:
    verb = command[0] if command else ""
    if verb in ROLES:
        return ROLES[verb]
    raise TuneshipError(
        f"no image answers {verb!r}" if verb else "nothing to run",
        hint=f"tuneship docker run {'|'.join(ROLES)} ...; benching needs no image, only the URL",
    )


def _named(command: Sequence[str], folder: Path) -> Iterator[Path]:
    """The folders outside of `folder` that a server is told to read: its model, each of --adapters."""
    for before, word in pairwise(command):
        option, _, value = word.partition("=")
        if before == "--adapters" or not (word.startswith("-") or before.startswith("--")):
            value = word
        elif option != "--adapters":
            continue
        path = Path(os.path.abspath(value))  # noqa: PTH100 - what a link is called is what is looked for inside
        if value and path.is_dir() and not path.is_relative_to(folder):
            yield path


def _each_once(binds: Iterable[Bind]) -> tuple[Bind, ...]:
    """An engine refuses two mounts at one path; who must write there decides."""
    read_only: dict[Path, bool] = {}
    for path, only_read in binds:
        read_only[path] = read_only.get(path, True) and only_read
    return tuple(Bind(path, only_read) for path, only_read in read_only.items())


def _gpus(wish: str) -> str | tuple[str, ...]:
    if wish in {"none", "all"}:
        return wish
    ids = tuple(part.strip() for part in wish.split(","))
    if all(ids):
        return ids
    raise TuneshipError(f"--gpus {wish!r} is none of: none, all, ids such as 0,1")
