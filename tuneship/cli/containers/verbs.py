"""`tuneship docker build`, `tuneship docker run`: each prints the plain command, then does the same through the SDK."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from tuneship.cli.console import talk
from tuneship.cli.containers import engine
from tuneship.cli.containers.plan import Wishes, image_of, plan_run
from tuneship.cli.containers.words import PORT, Build, Role, published
from tuneship.core import hardware
from tuneship.core.errors import TuneshipError
from tuneship.core.progress import say

Words = Annotated[str, Parameter(allow_leading_hyphen=True)]
Port = Annotated[int, Parameter(validator=Number(gte=1, lte=65535))]


def build(role: Role, *, context: Path = Path(), tag: str = "", base: str = "", dry_run: bool = False) -> None:
    """Build the image that trains, or the one that serves, from a checkout of this repository.

    Parameters
    ----------
    role
        train or serve.
    context
        The checkout.
    tag
        The image's name (default: tuneship-train, tuneship-serve).
    base
        Another base image, in place of NVIDIA's: with apt, and a Python 3.11 or 3.12 in it.
    dry_run
        Print the plain command, and do nothing.

    """
    wanted = Build(role, context, tag or image_of(role), base)
    if not (context / wanted.dockerfile).is_file():
        raise TuneshipError(
            f"no {wanted.dockerfile} in {context.resolve()}",
            hint="images are built from a checkout: git clone it, or give --context",
        )
    if not _only_said(wanted.words(), dry_run):
        engine.build(wanted)


def run(
    verb: str,
    *words: Words,
    image: str = "",
    gpus: str = "auto",
    host: str = "127.0.0.1",
    port: Port = PORT,
    mount: list[Path] | None = None,
    env: list[str] | None = None,
    dry_run: bool = False,
) -> None:
    """Run a verb in its image, as you, in this folder: tuneship docker run serve runs/NAME/artifacts/merged-ID.

    Folders of this machine are at the same path inside: this one (read-only, for serve), those that serve is given, the
    cache, and the hub's.
    Options of this verb that the inner one has too (--port, --host) are of the outside; inside, they are the image's.

    Parameters
    ----------
    verb
        fetch, data, train, merge or base run in the image that trains; serve in the one that serves.
    words
        What the verb is given.
    image
        Another image than tuneship-train or tuneship-serve.
    gpus
        none, all, or ids such as 0,1; auto is all where this machine has one.
    host
        Address of this machine for the door of serve.
    port
        Port of this machine for the door of serve.
    mount
        Another folder to be read, at the same path; once for each.
    env
        An environment variable to be passed on, by name; once for each.
    dry_run
        Print the plain command, and do nothing.

    """
    if gpus == "auto":
        gpus = "all" if hardware.detect().gpus else "none"
    wishes = Wishes(image, host, port, gpus, tuple(mount or ()), tuple(env or ()))
    wanted = plan_run((verb, *words), wishes)
    if not _only_said(wanted.words(), dry_run):
        if wanted.publish:
            say(f"from here its door, at {PORT} inside, is http://{published(wanted.publish)}")
        code = engine.run(wanted)
        if code:
            sys.exit(code)  # it has said why


def _only_said(command: list[str], dry_run: bool) -> bool:
    """Print the plain command: as data where it is all that was asked for."""
    if dry_run:
        print(shlex.join(command))
    else:
        talk.print(shlex.join(command), style="dim", markup=False, soft_wrap=True)
    return dry_run
