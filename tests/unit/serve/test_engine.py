"""A start that fails: noticed at once, told in one sentence."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tuneship.core.errors import EngineError
from tuneship.core.process import descendants, kill_all, spawn
from tuneship.serve import engine as engines
from tuneship.serve import engine_log
from tuneship.serve.engine import Engine, free_port
from tuneship.serve.launch import LOOPBACK, EngineConfig

TAKEN = "error while attempting to bind on address ('127.0.0.1', 39865): address already in use"


def child(program: str, log: Path) -> Engine:
    """An engine whose process runs `program` instead of SGLang; it is given the port to listen on."""
    port = free_port()
    with log.open("wb") as output:
        process = spawn([sys.executable, "-c", program, str(port)], stdout=output)
    return Engine(process, EngineConfig(Path("/m"), "m", port, "float32", cpu=True), log)


def test_a_port_is_none_that_somebody_has_or_that_connections_get(monkeypatch):
    assert {free_port() // 10_000 for _ in range(20)} == {1}
    random.seed(0)
    first = [free_port() for _ in range(3)]
    random.seed(0)
    assert [free_port() for _ in range(3)] != first
    with socket.socket() as taken:
        port = free_port()
        taken.bind((LOOPBACK, port))
        monkeypatch.setattr(engines, "_PORTS", range(port, port + 1))
        monkeypatch.setattr(engines, "_TRIES", 1)
        assert free_port() != port


def test_an_early_exit_is_noticed_at_once(tmp_path: Path):
    engine = child("raise ValueError('no such backend')", tmp_path / "log")
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"^SGLang did not start: ValueError: no such backend$") as caught:
        engine.wait_ready([None], timeout_s=60)
    assert time.monotonic() - began < 10
    assert str(tmp_path / "log") in caught.value.hint


def test_an_exit_without_a_word(tmp_path: Path):
    engine = child("import os; os.kill(os.getpid(), 9)", tmp_path / "log")
    with pytest.raises(EngineError, match=r"SIGKILL .*memory"):
        engine.wait_ready([None], timeout_s=60)


def test_who_found_it_gone_is_not_why_it_went(tmp_path: Path):
    program = "import os; print('ConnectionError: refused', flush=True); os.kill(os.getpid(), 9)"
    with pytest.raises(EngineError, match="it ended with SIGKILL"):
        child(program, tmp_path / "log").wait_ready([None], timeout_s=60)


def test_a_worker_that_fell_is_why_although_the_main_process_was_killed(tmp_path: Path):
    program = f"import os; print({WORKER_FELL!r}, flush=True); os.kill(os.getpid(), 9)"
    with pytest.raises(EngineError, match="out of memory"):
        child(program, tmp_path / "log").wait_ready([None], timeout_s=60)


def test_a_start_that_takes_too_long(tmp_path: Path):
    engine = child("import time; time.sleep(60)", tmp_path / "log")
    try:
        with pytest.raises(EngineError, match=r"did not answer within 0\.5 s$"):
            engine.wait_ready([None], timeout_s=0.5)
    finally:
        engine.stop()
    assert engine.process.poll() is not None


def test_what_its_processes_counted_goes_with_it(tmp_path: Path):
    counters = tmp_path / f"log.counters-{os.getpid()}"
    counters.mkdir()
    (counters / "counter_1.db").touch()
    child("pass", tmp_path / "log").stop()
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


@pytest.mark.parametrize("killed", [False, True], ids=["stopped", "killed before"])
def test_what_its_scheduler_shares_in_memory_goes_with_it(tmp_path: Path, *, killed: bool):
    """Its name is random: it is known by who holds it open. Of other engines the files stay."""
    mine, others = (Path(f"/dev/shm/sglang_loads_tuneship-test-{os.getpid()}-{name}.shm") for name in ("mine", "other"))
    others.touch()
    engine = child(SHARES.format(file=str(mine)), tmp_path / "log")
    try:
        engine.wait_ready([None], timeout_s=30)
        assert mine.exists()
        if killed:
            kill_all({*descendants(engine.process.pid), psutil.Process(engine.process.pid)})
        engine.stop()
        assert not mine.exists()
        assert others.exists()
    finally:
        engine.stop()
        others.unlink()
        mine.unlink(missing_ok=True)


SHARES = """
import http.server, subprocess, sys
held = "import time; file = open({file!r}, 'w'); print(flush=True); time.sleep(60)"
scheduler = subprocess.Popen([sys.executable, '-c', held], stdout=subprocess.PIPE)
scheduler.stdout.readline()
class Answers(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), Answers).serve_forever()
"""


def test_stop_is_harmless_when_it_is_dead(tmp_path: Path):
    engine = child("pass", tmp_path / "log")
    engine.process.wait()
    engine.stop()
    assert engine.death == "it ended with exit code 0"


WORKER_FELL = """\
[2026-11-22 06:10:58] Ignore import error when loading sglang.srt.models.x: No module named 'vllm'
[2026-11-22 06:11:00] Scheduler hit an exception: Traceback (most recent call last):
  File "scheduler.py", line 1, in run
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB
[2026-11-22 06:11:01] Received sigquit from a child process. It usually means the child failed.
EOFError: ran out
"""
SILLY = "ValueError: this request was silly\n"
ANSWERED = '[2026-11-22 06:11:00] INFO:     127.0.0.1:3 - "POST /generate HTTP/1.1" 200 OK\n'
FELL = "[2026-11-22 06:12:01] SIGQUIT received. It usually means one child failed.\n"
LOGS = {
    "usage": (
        "usage: sglang serve [-h]\n    [--x {a,b}]\nsglang serve: error: unrecognized arguments: --no-such-flag\n",
        "unrecognized arguments: --no-such-flag",
    ),
    "the worker's traceback, then the fall": (
        WORKER_FELL,
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB",
    ),
    "killed worker": (
        "[2026-11-22 06:11:00] Subprocess scheduler_0 (pid=7) crashed with exit code -9. Triggering SIGQUIT\n",
        "Subprocess scheduler_0 crashed with exit code -9",
    ),
    "a request's own failure long before": (
        SILLY + "POST /generate 400\n" + WORKER_FELL,
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB",
    ),
    "the main process's last words": (
        "KeyError: 'a'\nDuring handling of the above exception\nsglang.x.ConfigError: no such model type\n",
        "ConfigError: no such model type",
    ),
    "a request's own failure, and work after it": (SILLY + "[2026-11-22 06:12] Decode batch, #token: 23\n" + FELL, ""),
    "and an answer after it": (SILLY + ANSWERED + FELL, ""),
    "what it died of while it worked": (ANSWERED + SILLY + FELL, "ValueError: this request was silly"),
    "a port that somebody took": (
        f"[2026-11-22 06:12] INFO:     Waiting\n[2026-11-22 06:12] ERROR:    [Errno 98] {TAKEN}\n",
        TAKEN,
    ),
    "nothing": ("loading\nloading\n", ""),
}


@pytest.mark.parametrize(("text", "said"), LOGS.values(), ids=LOGS.keys())
def test_the_reason_in_the_log(tmp_path: Path, text: str, said: str):
    (tmp_path / "log").write_text(text)
    assert engine_log.reason(tmp_path / "log") == said


def test_serve_is_light_until_it_runs():
    heavy = "{'torch', 'sglang', 'starlette', 'uvicorn', 'aiohttp', 'safetensors', 'pydantic'}"
    code = f"import sys, tuneship.serve.commands; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
