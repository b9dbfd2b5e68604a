"""One sentence out of SGLang's log: why it ended.

SGLang reports a failure several times: the worker's traceback, the main process's traceback about the worker, a stack
dump, "child failed". What a worker says first is the cause; what follows is the fall. An exception after which it went
on answering ended one request alone, and is no cause.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import takewhile
from pathlib import Path

from tuneship.core.process import tail

PORT_TAKEN = "address already in use"
_LOOK_BACK_LINES = 400
_WORKER_FAILED = "hit an exception"
_EXCEPTION = re.compile(r"^(?:\[[^\]]*\] ?)?(?:\w+\.)*(\w*(?:Error|Exception|Exit): .+)$")
_USAGE = re.compile(r"^[\w. ]+: error: (.+)$")
_BIND = re.compile(rf"ERROR: +\[Errno \d+\] (.*{PORT_TAKEN})$")
_KILLED = re.compile(r"(Subprocess \S+) \(pid=\d+\) (crashed with exit code -?\d+)")
_AT_WORK = re.compile(r"\] (?:Prefill|Decode) batch, |\" 200 OK$")
_MAX_LENGTH = 300


def reason(log: Path, *, main_was_killed: bool = False) -> str:
    """The cause of the failure that `log` ends with; empty when it shows none.

    `main_was_killed`: a signal ended the main process. Only a worker's failure can be the cause then; other exceptions
    in the log are of those who found it gone.
    """
    lines = tail(log, _LOOK_BACK_LINES).splitlines()
    failed = next((number for number, line in enumerate(lines) if _WORKER_FAILED in line), None)
    worker = next(_exceptions(lines[failed:]), "") if failed is not None else ""
    killed = next((" ".join(match.groups()) for line in lines if (match := _KILLED.search(line))), "")
    after_work = takewhile(lambda line: not _AT_WORK.search(line), reversed(lines))
    last = "" if main_was_killed else next(_exceptions(after_work), "")
    return (worker or killed or last)[:_MAX_LENGTH]


def _exceptions(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        match = _USAGE.match(line) or _EXCEPTION.match(line) or _BIND.search(line)
        if match:
            yield match[1]
