"""One registry, one server: a lock that ends with the process that holds it, and says who that is."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from tuneship.core.errors import RegistryError


def hold(registry: Path, *, serves: bool = True) -> int:
    """Lock `registry` for this process, until the descriptor that is returned is closed.

    `serves`: for a server; else for a verb that stands in for one.

    The lock file stays: one that is removed while another process opens it would be held twice.

    Raises:
        RegistryError: a living process holds it.

    """
    descriptor = os.open(f"{registry}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
        os.close(descriptor)
        raise RegistryError(
            f"{registry} belongs to a server that is running: process {holder or '(just starting)'}",
            hint="end that one first, or give this server a --state directory of its own"
            if serves
            else "leave --state out: the server that is running does it, while it answers",
        ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor
