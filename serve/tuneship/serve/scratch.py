"""Folders beside a server's log that are this process's own, such as `engine.log.counters-4711`.

A server that ends takes its own with it; those of servers that were killed are swept by the next one on the same log.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import psutil


def folder(log: Path, kind: str) -> Path:
    """Where this process keeps things of that kind; it need not be there."""
    return log.with_name(f"{log.name}.{kind}-{os.getpid()}").absolute()


def fresh(log: Path, kind: str) -> Path:
    """The same, made anew and empty; what killed servers left of that kind is gone."""
    mine = folder(log, kind)
    for old in (mine, *_left_behind(log, kind)):
        shutil.rmtree(old, ignore_errors=True)
    mine.mkdir(parents=True)
    return mine


def _left_behind(log: Path, kind: str) -> list[Path]:
    found = ((path, path.name.rpartition("-")[2]) for path in log.absolute().parent.glob(f"{log.name}.{kind}-*"))
    return [path for path, pid in found if not (pid.isdecimal() and psutil.pid_exists(int(pid)))]
