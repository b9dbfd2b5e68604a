"""A user's servers as files: who runs is found, who was killed is not, and nobody else reads the key."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tuneship.core.errors import EndpointError
from tuneship.serve import running
from tuneship.serve.running import Running, announced, find

HERE = Running(url="http://127.0.0.1:1", admin_url="http://127.0.0.1:2", admin_key="k")


def test_a_server_is_found_while_it_runs():
    with announced(HERE):
        assert find() == find("http://127.0.0.1:1/") == find(HERE.admin_url) == HERE
        file = folder() / f"{os.getpid()}.json"
        assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    with pytest.raises(EndpointError, match="no server is running"):
        find()


def test_of_several_one_is_named():
    with announced(HERE), subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        (folder() / f"{other.pid}.json").write_text(HERE.model_copy(update={"url": "http://x"}).model_dump_json())
        with pytest.raises(EndpointError, match=r"2 servers are running: .*http://x"):
            find()
        assert find(HERE.url) == HERE
        other.communicate(b"\n")
        assert find() == HERE


def test_files_of_others_are_no_servers():
    folder().mkdir(parents=True)
    (folder() / "notes.json").write_text("{}")
    (folder() / f"{os.getpid()}.json").write_text("half of")
    with pytest.raises(EndpointError, match="no server is running"):
        find()


def test_a_process_that_took_a_killed_servers_number_is_none():
    with announced(HERE):
        os.utime(folder() / f"{os.getpid()}.json", (1, 1))
        with pytest.raises(EndpointError, match="no server is running"):
            find()


def test_another_ones_server_needs_its_key(monkeypatch):
    with pytest.raises(EndpointError, match="no server of yours runs at http://there"):
        find("http://there")
    monkeypatch.setenv(running.ADMIN_KEY_VARIABLE, "theirs")
    assert find("http://there/") == Running(url="http://there", admin_url="http://there", admin_key="theirs")


def folder() -> Path:
    return Path(os.environ["TUNESHIP_CACHE"]) / "servers"
