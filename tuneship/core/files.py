"""Files that are either there whole or not there at all, and their hashes."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path


def short(path: Path) -> str:
    """`path` for a reader: relative to where they are, where that is shorter to type."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)


def write_atomic(path: Path, text: str, *, mode: int = 0o644) -> None:
    """Replace `path` with `text`: readers see the old content or the new, also after a crash. `mode` is the file's.

    Raises:
        OSError: the disk is full or the directory cannot be written; `path` is as it was.

    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(mode)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make a rename in `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Flush every file and directory below `path` to disk."""
    for folder, _, names in os.walk(path):
        for name in names:
            with (Path(folder) / name).open("rb") as file:
                os.fsync(file.fileno())
        sync_directory(Path(folder))


def read_up_to(path: Path, most: int) -> bytes:
    """What is in the file, which may be anybody's: of more than `most` bytes one more, so that it shows."""
    with path.open("rb") as file:
        return file.read(most + 1)


def read_at(descriptor: int, start: int, into: memoryview) -> int:
    """Fill `into` with what a file has from byte `start` on; how many bytes that were, fewer where it ends."""
    done = 0
    while done < len(into) and (count := os.preadv(descriptor, [into[done:]], start + done)):
        done += count
    return done


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    """Hex SHA-256 of a string as UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_listing(entries: Iterable[tuple[str, int, str]]) -> str:
    """Hex SHA-256 over sorted (path, size in bytes, sha256) lines: the identity of a set of files."""
    lines = [f"{path}\t{size}\t{digest}\n" for path, size, digest in sorted(entries)]
    return sha256_text("".join(lines))
