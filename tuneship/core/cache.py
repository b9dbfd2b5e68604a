"""Where tuneship keeps things of the user's: the cache (converted models, hashes of large files), state, API keys."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tuneship.core.files import sha256_file, sha256_text, write_atomic


def cache_dir() -> Path:
    """The cache's root, made if missing."""
    fallback = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tuneship"
    root = Path(os.environ.get("TUNESHIP_CACHE") or fallback)
    root.mkdir(parents=True, exist_ok=True)
    return root


def state_dir() -> Path:
    """`$TUNESHIP_STATE` (default `~/.local/state/tuneship`): what must outlive the cache, made if missing."""
    fallback = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "tuneship"
    root = Path(os.environ.get("TUNESHIP_STATE") or fallback)
    root.mkdir(parents=True, exist_ok=True)
    return root


def keys_file() -> Path:
    """API keys: `$TUNESHIP_KEYS`, or `tuneship/keys.toml` where the user's settings are (`~/.config`); not made.

    Not in the cache: what lies there may be deleted at any time, and a server without keys would be an open one.
    """
    settings = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return Path(os.environ.get("TUNESHIP_KEYS") or settings / "tuneship" / "keys.toml")


def memo_sha256(path: Path) -> str:
    """Hex SHA-256 of a large file, remembered until its size or modification time changes."""
    status = path.stat()
    key = {"path": str(path), "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    folder = cache_dir() / "hashes"
    folder.mkdir(exist_ok=True)
    memo = folder / sha256_text(str(path))[:32]
    try:
        known = json.loads(memo.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        known = {}
    if all(known.get(name) == value for name, value in key.items()):
        return str(known["sha256"])
    digest = sha256_file(path)
    write_atomic(memo, json.dumps({**key, "sha256": digest}))
    return digest
