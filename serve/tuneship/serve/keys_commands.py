"""`tuneship keys`."""

from __future__ import annotations

import sys
from pathlib import Path


def add(name: str, *, models: str = "", admin: bool = False, file: Path | None = None) -> None:
    """Make an API key and print it, once: only its hash is kept.

    Parameters
    ----------
    name
        What it is called in `keys list`.
    models
        The aliases that it may use, with commas between them; the base by its name. Without: all.
    admin
        It may also load, promote and unload.
    file
        The keys file; by default $TUNESHIP_KEYS or ~/.config/tuneship/keys.toml.

    """
    from tuneship.core.cache import keys_file  # noqa: PLC0415
    from tuneship.core.progress import say  # noqa: PLC0415 - `--help` starts without all of this
    from tuneship.serve import keys  # noqa: PLC0415

    path = file or keys_file()
    wanted = [model.strip() for model in models.split(",")] if models else None
    secret = keys.add(path, name, wanted, admin=admin)
    print(secret)
    say(f"the key is shown this once; its hash is in {path}")


def list_(*, file: Path | None = None) -> None:
    """Show the keys' names and what each may do; the keys themselves are not stored.

    Parameters
    ----------
    file
        The keys file; by default $TUNESHIP_KEYS or ~/.config/tuneship/keys.toml.

    """
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    from tuneship.core.cache import keys_file  # noqa: PLC0415
    from tuneship.core.progress import say  # noqa: PLC0415
    from tuneship.serve import keys  # noqa: PLC0415

    table = Table("key", "models", "admin", "created")
    for name, record in keys.read(file or keys_file()).items():
        models = "all" if record.models is None else ", ".join(record.models)
        table.add_row(name, models, "yes" if record.admin else "no", record.created)
    if not table.rows:
        say("no key yet: tuneship keys add NAME")
        return
    Console(width=None if sys.stdout.isatty() else 140).print(table, highlight=False)


def revoke(name: str, *, file: Path | None = None) -> None:
    """Make a key invalid, in running servers too, within a second; what it asked before is still answered.

    Parameters
    ----------
    name
        The key's name, as `keys list` shows it.
    file
        The keys file; by default $TUNESHIP_KEYS or ~/.config/tuneship/keys.toml.

    """
    from tuneship.core.cache import keys_file  # noqa: PLC0415
    from tuneship.core.progress import say  # noqa: PLC0415
    from tuneship.serve import keys  # noqa: PLC0415

    path = file or keys_file()
    left = keys.revoke(path, name)
    say(
        f"revoked {name}; {len(left)} left"
        if left
        else f"revoked {name}, the last one: nobody gets in until you add one"
    )
