"""When figures were made, and of which state of this repository."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[2]


def made() -> dict[str, str]:
    """`{"date": ..., "commit": ...}`; `-dirty` where tracked files of the tools differ from it, empty without git."""
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", "tuneship", "serve", "train", "bench/studies")
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"date": date, "commit": f"{commit}{'-dirty' if changed else ''}"}


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
