"""A server that is started again on what another one left: moved, in another dtype, with less room, with a bad version.

The tests stand in the order of one state's life; each starts a server on it, and ends it.
"""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import pytest

pytestmark = pytest.mark.integration


class Kept:
    """A server's folder, which outlives it and moves about."""

    def __init__(self, folder: Path, model: Path, start) -> None:
        self.folder, self._model, self._start = folder, model, start

    @contextmanager
    def served(self, *words: str, dtype: str = "float32") -> Iterator[str]:
        """The URL of a server on it, which is ended like one of a machine that goes down."""
        server = self.start(*words, dtype=dtype)
        yield server.wait_ready()
        server.signal(signal.SIGTERM)
        assert server.exit_code() == 0

    def start(self, *words: str, dtype: str = "float32"):
        return self._start(str(self._model), "--state", str(self.folder), "--dtype", dtype, *words)

    def refused(self, *words: str) -> tuple[str, bool]:
        """(what a server that does not start says, whether the engine was started)."""
        server = self.start(*words)
        assert server.exit_code(200) == 1
        assert "Traceback" not in server.said
        return server.said, (server.folder / "engine.log").exists()

    def rows(self, *columns: str) -> list[tuple[str, ...]]:
        with sqlite3.connect(self.folder / "registry.sqlite") as connection:
            found = connection.execute(f"SELECT {', '.join(columns)} FROM versions ORDER BY alias").fetchall()
        connection.close()
        return found

    def take_out(self, name: str) -> None:
        argv = [sys.executable, "-m", "tuneship", "adapters", "unload", name, "--state", str(self.folder)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def kept(start_module_server, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    return Kept(tmp_path_factory.mktemp("kept") / "state", tiny_model, start_module_server)


async def heard(url: str, markers: dict[str, str]) -> set[str]:
    """The adapters that answer with their own voice; who is not served is not among them."""
    found = set()
    async with aiohttp.ClientSession(url) as session:
        for name, marker in markers.items():
            body = {"model": name, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 10}
            async with session.post("/v1/chat/completions", json={**body, "temperature": 0}) as response:
                answer = await response.json()
                assert response.status in {200, 404}, answer
            if response.status == 200:
                assert answer["choices"][0]["message"]["content"].startswith(marker)
                found.add(name)
    return found


async def test_its_folder_is_moved_between_two_servers(kept, marker_adapters, markers):
    with kept.served("--adapters", str(marker_adapters)) as url:
        assert await heard(url, markers) == set(markers)
    before = kept.rows("name", "path", "verified_under")
    kept.folder = kept.folder.rename(kept.folder.with_name("moved"))
    with kept.served() as url:
        assert await heard(url, markers) == set(markers)
    assert kept.rows("name", "path", "verified_under") == before


async def test_in_another_dtype_every_version_is_verified_again(kept, markers):
    before = kept.rows("verified_under")
    with kept.served(dtype="bfloat16") as url:
        assert await heard(url, markers) == set(markers)
    assert all("float32" in under for (under,) in before)
    assert all("bfloat16" in under for (under,) in kept.rows("verified_under"))
    assert {state for (state,) in kept.rows("state")} == {"live"}


def test_with_less_room_it_is_refused_by_name_and_nothing_starts(kept):
    said, engine = kept.refused("--max-rank", "1")
    assert not engine
    for (name,) in kept.rows("name"):
        assert f"tuneship adapters unload {name} --state " in said
    assert "or take it out" in said


async def test_one_that_keeps_the_engine_from_starting_is_named_and_taken_out(kept, markers):
    *_, (alias, name, path) = kept.rows("alias", "name", "path")
    config = kept.folder / path / "adapter_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "target_modules": [*settings["target_modules"], "embed_tokens"]}))
    said, engine = kept.refused()
    assert engine
    assert f"{name}, which the state in" in said
    assert "keeps the engine from starting" in said
    kept.take_out(name)
    with kept.served() as url:
        assert await heard(url, markers) == {*markers} - {alias}
