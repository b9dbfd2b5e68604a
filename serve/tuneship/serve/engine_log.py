"""One sentence out of SGLang's log: why it ended.

SGLang reports a failure several times: the worker's traceback, the main process's traceback about the worker, a stack
dump, "child failed". The first exception is the cause; what follows is the fall.
"""

from __future__ import annotations

import re
from pathlib import Path

from tuneship.core.process import tail

_LOOK_BACK_LINES = 400
_EXCEPTION = re.compile(r"^(?:\[[^\]]*\] ?)?((?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit)): (.+)$")
_USAGE = re.compile(r"^\S+: error: (.+)$")
_KILLED = re.compile(r"(?:Subprocess|Rank) .*(?:crashed|died).*")
_MAX_LENGTH = 300


def reason(log: Path) -> str:
    """The cause of the failure that `log` ends with; empty when it shows none."""
    lines = tail(log, _LOOK_BACK_LINES).splitlines()
    found = [said for line in lines if (said := _exception(line))] or [
        match[0] for line in lines if (match := _KILLED.search(line))
    ]
    return found[0][:_MAX_LENGTH] if found else ""


def _exception(line: str) -> str:
    usage = _USAGE.match(line)
    if usage:
        return usage[1]
    match = _EXCEPTION.match(line)
    return f"{match[1].rpartition('.')[2]}: {match[2]}" if match else ""
