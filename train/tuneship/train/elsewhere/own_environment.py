"""An environment of its own for a library that does not install beside ours: built by uv when it is first used.

    python = own_environment.python("llm-compressor", ("llmcompressor==0.13.0", "torch==2.11.0"), extra="compress")

It lies in the cache under a name made of its requirements, whole or not at all, and can be deleted at any time.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from tuneship.core.cache import cache_dir
from tuneship.core.errors import TrainError
from tuneship.core.files import sha256_text
from tuneship.core.process import spawn, stop_tree, tail
from tuneship.core.progress import say

_COMPLETE = ".complete"
_GRACE_S = 5.0


def python(name: str, requirements: Sequence[str], *, extra: str) -> Path:
    """The interpreter of an environment with exactly `requirements` and what they need; `extra` of ours brings uv.

    Raises:
        TrainError: no uv here, or it could not install them.

    """
    folder = cache_dir() / "environments" / f"{name}-{sha256_text(' '.join(requirements))[:12]}"
    interpreter = folder / "bin" / "python"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / _COMPLETE).is_file():
            shutil.rmtree(folder, ignore_errors=True)  # half of one
            uv = _uv(extra)
            say(f"installing {requirements[0]} into an environment of its own (once; {folder})")
            _run(uv, "venv", "--quiet", "--python", sys.executable, str(folder))
            _run(uv, "pip", "install", "--quiet", "--python", str(interpreter), *requirements)
            (folder / _COMPLETE).touch()
    return interpreter


def run(interpreter: Path, program: Path, *words: str, log: Path, env: dict[str, str]) -> None:
    """Run `program` there to its end, its output in `log`; it ends when we do.

    Raises:
        TrainError: it failed; with the last lines of the log.

    """
    with log.open("wb") as output:
        process = spawn([str(interpreter), str(program), *words], stdout=output, env=env)
        try:
            code = process.wait()
        finally:
            stop_tree(process, _GRACE_S)
    if code:
        raise TrainError(f"{program.name} ended with code {code}:\n{tail(log, 8)}", hint=f"all of it: {log}")


def _run(*command: str) -> None:
    # Not here: uv would apply the settings of a project that it finds in or above this folder, such as our own.
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cache_dir())
    if done.returncode:
        raise TrainError(
            f"{' '.join(command[:3])} failed: {done.stderr.strip()[-500:]}", hint="is the package index reachable?"
        )


def _uv(extra: str) -> str:
    """The uv on PATH, beside this interpreter, or where `make setup` puts it."""
    here = Path(sys.prefix)
    found = shutil.which("uv") or next(
        (str(path) for path in (here / "bin" / "uv", here.parent / ".tools" / "bin" / "uv") if path.is_file()), None
    )
    if found is None:
        raise TrainError(
            "an environment of its own needs uv, which is not on PATH", hint=f"pip install 'tuneship[{extra}]'"
        )
    return found
