"""The SGLang that is installed: programs beside it in a process of their own, and its source."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path


def run_python(program: str, **environment: str) -> dict:
    """What `program` prints, as JSON; it is an engine of ours only where `environment` says so."""
    plain = {key: value for key, value in os.environ.items() if key != "TUNESHIP_ENGINE"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=plain | environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def sglang_source(name: str) -> str:
    """A file below `sglang/srt`."""
    (sglang,) = find_spec("sglang").submodule_search_locations
    return (Path(sglang) / "srt" / name).read_text()
