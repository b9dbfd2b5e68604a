"""A server of adapters on one tiny base, each with a marker of its own that its answers begin with."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import awaited
import psutil

from tuneship.core.process import stop_tree

ROOT = Path(__file__).parents[2]
ALIASES = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen")
BASE = "tiny-llama"
_START_S = 240


def prepare(folder: Path) -> tuple[dict[str, str], list[Any]]:
    """The base and the adapters, made by the makers of the tests: {directory: marker}, and the prompts."""
    makers = makers_of_tests()
    base = makers.build_tiny_model(folder / BASE, seed=0)
    markers = {f"{alias}-{number}": f"<{alias}{number}>" for alias in ALIASES for number in (1, 2)}
    for name, marker in markers.items():
        makers.train_marker(base, folder / name, marker)
    (folder / "first").mkdir()
    for alias in ALIASES:
        (folder / "first" / alias).symlink_to(folder / f"{alias}-1")
    return markers, makers.make_chats(50, seed=5)


def makers_of_tests() -> Any:
    """`tests/conftest.py`, which makes tiny models, adapters and prompts for the tests."""
    spec = importlib.util.spec_from_file_location("makers", ROOT / "tests" / "conftest.py")
    assert spec
    assert spec.loader
    sys.path.insert(0, str(ROOT))  # it has neighbours
    try:
        makers = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(makers)
    finally:
        sys.path.remove(str(ROOT))
    return makers


def contents(folder: Path, markers: dict[str, str]) -> dict[str, str]:
    """{first 12 digits of a content id: marker}."""
    from tuneship.core.model_source import ModelSource  # noqa: PLC0415
    from tuneship.serve import preflight  # noqa: PLC0415

    base = preflight.read_base(ModelSource(str(folder / BASE), "", folder / BASE))
    return {preflight.check(folder / name, base).content_id[:12]: marker for name, marker in markers.items()}


@contextmanager
def served(folder: Path) -> Any:
    """A server of the first version of each adapter."""
    file = folder / "endpoint.json"
    argv = [sys.executable, "-m", "tuneship", "serve", str(folder / BASE), "--adapters", str(folder / "first")]
    argv += ["--dtype", "float32", "--port", "0", "--max-loras", "8", "--max-rank", "8", "--restarts", "10"]
    argv += ["--endpoint-file", str(file), "--log", str(folder / "engine.log")]
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(argv, stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        endpoint = awaited.endpoint(process, file, _START_S)
        if endpoint is None:
            raise SystemExit(f"the server did not start:\n{(folder / 'output').read_text()}")
        yield endpoint.url, psutil.Process(process.pid)
        if process.poll() is not None:
            raise SystemExit(f"the server ended:\n{(folder / 'output').read_text()}")
    finally:
        stop_tree(process, 40)
        print((folder / "output").read_text(), file=sys.stderr)
