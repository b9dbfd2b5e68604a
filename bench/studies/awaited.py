"""A `tuneship serve` that a study has started, once it answers.

found = endpoint(process, folder / "endpoint.json", within_s=240)     # None: it ended, or it takes too long
"""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from tuneship.core.endpoint import Endpoint, read_endpoint

_LOOK_S = 0.2


def endpoint(process: subprocess.Popen[bytes], file: Path, within_s: float) -> Endpoint | None:
    """What the server wrote into `file`; None where it ended before, or has not within `within_s`."""
    deadline = time.monotonic() + within_s
    while not file.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            return None
        time.sleep(_LOOK_S)
    return read_endpoint(file)
