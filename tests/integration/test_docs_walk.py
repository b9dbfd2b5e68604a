"""The pages for readers, typed command by command in one folder; a tiny model has the bundled one's name."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tuneship.serve import running

HERE = Path(__file__).parent
sys.path.append(str(HERE))
import docs_pages  # noqa: E402
import docs_standin  # noqa: E402
import docs_walk  # noqa: E402

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

LIMIT_S = 180
TWO_READERS = (("getting-started", "serve-merged"), ("data", "train"))
"""Pages that need nothing of each other, and go on together on two cores; the rest follows."""
DOOR = """
import os, signal, socket, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
with socket.create_server(("127.0.0.1", int(sys.argv[1]))):
    if os.fork():
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
        print("ready", flush=True)
    time.sleep(600)
"""
"""A server whose child keeps the port."""


def test_the_pages_can_be_followed(tmp_path: Path):
    standin = docs_standin.build(docs_pages.ROOT / "recipes", tmp_path)
    port = docs_walk.free_port()
    # On a busy machine two threads that wait for each other make a tiny model ten times slower than one.
    own = {**standin.environment, "OMP_NUM_THREADS": "1"}
    environment = {**docs_walk.environment(standin.folder, port=port), **own}
    names = [name for names in TWO_READERS for name in names]
    rest = [page.stem for page in docs_pages.WALKED if page.stem not in names]

    def follow(walked: docs_walk.Walk, names: Sequence[str]) -> list[str]:
        failed = []
        for outcome in walked.follow([page for page in docs_pages.WALKED if page.stem in names]):
            print(docs_walk.line(outcome), flush=True)
            if outcome.problem:
                failed.append(f"{docs_walk.line(outcome)}\n{docs_walk.complaint(outcome)}")
        return failed

    # A timeout here closes the walks first: the pool then waits for no command.
    with ThreadPoolExecutor(len(TWO_READERS)) as pool, contextlib.ExitStack() as walks:
        readers = [
            walks.enter_context(
                contextlib.closing(docs_walk.Walk(standin.folder, environment, LIMIT_S, names[0], port))
            )
            for names in (*TWO_READERS, rest)
        ]
        failed = [problem for found in pool.map(follow, readers, TWO_READERS) for problem in found]
        failed += follow(readers[-1], rest)
    assert not failed, "\n".join(failed)


def outcomes(text: str, folder: Path, limit_s: float = 10, **options: str) -> list[docs_walk.Outcome]:
    """What a page of `text` comes to."""
    page = folder / "page.md"
    page.write_text(text, encoding="utf-8")
    environment = docs_walk.environment(folder, **options)
    with contextlib.closing(docs_walk.Walk(folder, environment, limit_s, port=docs_walk.free_port())) as walked:
        return list(walked.follow([page]))


def test_what_goes_wrong_is_seen(tmp_path: Path):
    lines = ("false", "true    # exit 1", "# Ctrl-C in its terminal", "kept=words", 'echo "$kept"')
    text = "".join(f"    {line}\n" for line in lines) + "\n```text\nother words\n```\n"
    found = outcomes(text, tmp_path)
    assert [outcome.problem for outcome in found] == [
        "exit 1, not 0",
        "exit 0, not 1",
        "nothing runs",
        "",
        "it does not say 'other words'",
    ]
    assert found[-1].printed == "words\n"


def test_what_does_not_end_is_ended(tmp_path: Path):
    (outcome,) = outcomes("    sleep 600\n", tmp_path, 1)
    assert outcome.problem == "still running after 1 s"
    assert processes(tmp_path) == []


def test_a_walk_that_is_closed_ends_its_step_and_begins_no_other(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("    sleep 600\n    touch another\n", encoding="utf-8")
    walked = docs_walk.Walk(tmp_path, docs_walk.environment(tmp_path), 60)
    with ThreadPoolExecutor(1) as pool, contextlib.closing(walked):
        found = pool.submit(lambda: list(walked.follow([page])))
        wait_for(lambda: any("sleep" in one.cmdline() for one in processes(tmp_path)), 10)
    assert found.result(0) == []
    assert not (tmp_path / "another").exists()
    assert processes(tmp_path) == []


def test_a_server_that_outlives_its_terminal_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(docs_walk, "_PORT_FREE_S", 0.5)
    port = docs_walk.free_port()
    (tmp_path / "door.py").write_text(DOOR, encoding="utf-8")
    text = f"    {sys.executable} door.py {port}    # leave it running\n\n```text\nready\n```\n"
    page = tmp_path / "page.md"
    page.write_text(f"{text}\n    # Ctrl-C in its terminal\n", encoding="utf-8")
    with contextlib.closing(docs_walk.Walk(tmp_path, docs_walk.environment(tmp_path), 10, port=port)) as walked:
        found = [outcome.problem for outcome in walked.follow([page])]
    assert found == ["", f"port {port} still answers 0.5 s after Ctrl-C"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_is_left_behind(tmp_path: Path, number: signal.Signals):
    (tmp_path / "recipes").mkdir()
    page, work = tmp_path / "page.md", tmp_path / "work"
    command = "bash -c 'echo ready; sleep 600'    # leave it running"
    page.write_text(f"    {command}\n\n```text\nready\n```\n\n    sleep 601\n", encoding="utf-8")
    options = ["--repo", str(tmp_path), "--work", str(work), "--port", str(docs_walk.free_port()), str(page)]
    environment = {**os.environ, "TUNESHIP_CACHE": str(tmp_path / "cache")}
    with (tmp_path / "output").open("wb") as output:
        walking = subprocess.Popen(
            [sys.executable, docs_walk.__file__, *options], stdout=output, stderr=output, env=environment
        )
    try:
        wait_for(lambda: any("sleep 601" in " ".join(one.cmdline()) for one in processes(work)), 60)
        walking.send_signal(number)
        assert walking.wait(30) == (128 + number if number == signal.SIGTERM else -number)
        wait_for(lambda: not processes(work), 30)
    finally:
        walking.kill()
        walking.wait()


def test_a_walk_does_not_begin_beside_another_server(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        environment = docs_walk.environment(tmp_path) | {"TUNESHIP_CACHE": str(tmp_path / "cache")}
        assert docs_walk.in_the_way(environment, port) == f"port {port} is in use, and the pages' servers need it"
    free = docs_walk.free_port()
    assert docs_walk.in_the_way(environment, free) == ""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TUNESHIP_CACHE", environment["TUNESHIP_CACHE"])
        with running.announced(running.Running(url="http://here:1", admin_url="http://here:2", admin_key="key")):
            assert docs_walk.in_the_way(environment, free).startswith("a server of yours runs")


def test_a_printed_line_is_good_for_one_shown_line():
    step = docs_pages.Step("page", 1, "list", shown=("one@... live passed", "two@3f live passed", "... live"))
    assert step.missing("two@1a live passed\none@2b live passed\nthree live") == []
    assert step.missing("one@1a live passed\none@2b live passed\nthree live") == ["two@3f live passed"]
    assert step.missing("two@1a live passed\none@2b live passed") == ["... live"]


def processes(folder: Path) -> list[psutil.Process]:
    """Those that run in `folder`."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cwd() == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def wait_for(condition: Callable[[], object], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "still waiting"
        time.sleep(0.1)


def test_another_way_to_start_tuneship(tmp_path: Path):
    text = "    tuneship serve BASE\n    tuneship up RECIPE\n    tuneship top --once\n"
    found = outcomes(text, tmp_path, tuneship="echo started:", engine_args="--attention-backend triton")
    assert [outcome.printed.strip() for outcome in found] == [
        "started: serve BASE --extra-arg=--attention-backend --extra-arg=triton",
        'started: up RECIPE --serve.extra_args ["--attention-backend", "triton"]',
        "started: top --once",
    ]


def test_servers_of_a_walk_listen_elsewhere(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(
        "    tuneship serve BASE\n    tuneship up RECIPE\n    echo http://here:30000/v1\n", encoding="utf-8"
    )
    environment = docs_walk.environment(tmp_path, "echo", port=7)
    with contextlib.closing(docs_walk.Walk(tmp_path, environment, 10, port=7)) as walked:
        said = [outcome.printed.strip() for outcome in walked.follow([page])]
    assert said == ["serve BASE --port 7", "up RECIPE --serve.port 7", "http://here:7/v1"]
