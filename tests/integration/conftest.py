"""Servers as a user starts them: `python -m tuneship serve ...`, watched from outside."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tuneship.core.endpoint import Endpoint, read_endpoint
from tuneship.core.process import descendants, stop_tree

START_TIMEOUT_S = 180
MARKERS = {"alpha": "<alpha>", "beta": "<beta>", "gamma": "<gamma>"}


@dataclass
class Server:
    """A `tuneship serve` in its own directory."""

    folder: Path
    process: subprocess.Popen[bytes]
    _family: set[psutil.Process] = field(default_factory=set)

    @property
    def endpoint_file(self) -> Path:
        return self.folder / "endpoint.json"

    @property
    def said(self) -> str:
        """Everything that it printed."""
        return (self.folder / "output").read_text()

    @property
    def endpoint(self) -> Endpoint:
        return read_endpoint(self.endpoint_file)

    def wait_ready(self) -> str:
        """The URL, once the door is open."""
        self.wait_for(self.endpoint_file.exists)
        self.family()
        return self.endpoint.url

    def wait_for(self, condition: Callable[[], object], timeout_s: float = START_TIMEOUT_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, f"it ended: {self.said}"
            assert time.monotonic() < deadline, f"still waiting: {self.said}"
            time.sleep(0.1)

    def family(self) -> set[psutil.Process]:
        """Every process of the engine that was ever seen."""
        self._family |= set(descendants(self.process.pid))
        return self._family

    def engine(self, name: str) -> psutil.Process:
        """The engine's process whose command line contains `name`."""
        (found,) = [process for process in self.family() if name in " ".join(process.cmdline())]
        return found

    def signal(self, number: signal.Signals) -> None:
        self.family()
        self.process.send_signal(number)

    def exit_code(self, timeout_s: float = 40) -> int:
        return self.process.wait(timeout_s)

    def assert_no_orphans(self, within_s: float = 5) -> None:
        """None of the engine's processes is left, and the endpoint is not announced any more."""
        assert self._family, "nobody was seen"
        _, alive = psutil.wait_procs(list(self._family), timeout=within_s)
        assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


StartServer = Callable[..., Server]


@pytest.fixture
def start_server(tmp_path: Path):
    """Factory (arguments...) -> a `Server` that is starting; all are ended with the test."""
    yield from _servers(tmp_path)


@pytest.fixture(scope="module")
def start_module_server(tmp_path_factory: pytest.TempPathFactory):
    """`start_server`, for a server that a module's tests share."""
    yield from _servers(tmp_path_factory.mktemp("server"))


def _servers(folder: Path):
    started: list[Server] = []

    def start(*arguments: str) -> Server:
        here = folder / f"server-{len(started)}"
        here.mkdir()
        files = ["--endpoint-file", str(here / "endpoint.json"), "--log", str(here / "engine.log")]
        argv = [sys.executable, "-m", "tuneship", "serve", *arguments, "--port", "0", *files]
        with (here / "output").open("wb") as output:
            started.append(Server(here, subprocess.Popen(argv, stdout=output, stderr=output, cwd=here)))
        return started[-1]

    yield start
    for server in started:
        stop_tree(server.process, grace_s=20)


@pytest.fixture(scope="session")
def marker_adapters(tiny_model: Path, marker_adapter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of three adapters on the tiny model, each with its own voice."""
    folder = tmp_path_factory.mktemp("marker-adapters")
    for name, marker in MARKERS.items():
        (folder / name).symlink_to(marker_adapter(tiny_model, name, marker))
    return folder


@pytest.fixture(scope="session")
def markers() -> dict[str, str]:
    """{adapter: what all of its answers begin with}."""
    return MARKERS
