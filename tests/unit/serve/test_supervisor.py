"""An engine that dies, hangs, or does not come back: noticed, started again with patience, given up in the end."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from tuneship.core.errors import EngineError, ParityError
from tuneship.core.process import spawn
from tuneship.core.recipe import Serve
from tuneship.serve import engine as engines
from tuneship.serve import supervisor as supervisors
from tuneship.serve.assembly import Parts
from tuneship.serve.calls import Call
from tuneship.serve.catalog import Catalog, Entry
from tuneship.serve.engine import Engine, free_port
from tuneship.serve.keys import Keyring
from tuneship.serve.launch import EngineConfig
from tuneship.serve.metrics import Live, Metrics
from tuneship.serve.refusals import Refusal
from tuneship.serve.routes import Routes
from tuneship.serve.server import Access, Files, _Server
from tuneship.serve.supervisor import Patience, Phase, Supervisor
from tuneship.serve.upstream import Upstream

# Answers as SGLang does; `/die` and `/hang` are what happens to it. It notes each start in a file.
PROGRAM = """
import http.server, os, pathlib, sys, threading, time
port, starts, good = int(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
with starts.open("a") as file:
    file.write(f"{os.getpid()} {time.monotonic()}\\n")
if len(starts.read_text().splitlines()) > good >= 0:
    print("torch.OutOfMemoryError: CUDA out of memory", flush=True)
    sys.exit(1)
hung = threading.Event()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/die":
            os._exit(9)
        if self.path == "/hang":
            hung.set()
        if self.path == "/slow":
            time.sleep(6)
        elif hung.is_set():
            time.sleep(60)
        self.answer()
    def do_GET(self):
        if hung.is_set():
            time.sleep(60)
        self.answer()
    def answer(self):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b"{}")
    def log_message(self, *_):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
CALL = Call(Entry("a", "a@1", None, Path("/a"), "", ""), b"{}")


@pytest.fixture
def starts(tmp_path: Path) -> Path:
    return tmp_path / "starts"


@pytest.fixture
def good_starts() -> int:
    """How many of them go well; -1 is all."""
    return -1


@pytest.fixture(autouse=True)
def _scripted(monkeypatch: pytest.MonkeyPatch, starts: Path, good_starts: int):
    """Engines run the program above."""

    def start(config: EngineConfig, log: Path) -> Engine:
        with log.open("wb") as output:
            process = spawn(
                [sys.executable, "-c", PROGRAM, str(config.port), str(starts), str(good_starts)], stdout=output
            )
        return Engine(process, config, log)

    monkeypatch.setattr(engines, "start", start)


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with Upstream() as upstream:
        yield upstream


@pytest.fixture
async def supervisor(upstream: Upstream, tmp_path: Path) -> AsyncIterator[Supervisor]:
    made = Supervisor(
        lambda: EngineConfig(Path("/m"), "m", free_port(), "float32", cpu=True),
        tmp_path / "log",
        upstream,
        Patience(start_s=60, hang_s=2.0, restarts=2),
    )
    yield made
    made.stop()


async def kept(supervisor: Supervisor, upstream: Upstream, path: str) -> None:
    """Ask `path` of a running engine, and wait until what comes of it is over."""
    await supervisor.start()
    keeping = asyncio.create_task(supervisor.keep())
    with pytest.raises(Refusal) as refused:
        await upstream.ask(path, CALL)
    assert refused.value.status == 503
    while supervisor.phase is Phase.READY and not keeping.done():  # noqa: ASYNC110 - a moment, and no event
        await asyncio.sleep(0.05)
    with pytest.raises(Refusal) as shut:  # meanwhile nobody is sent to it
        await upstream.ask("/generate", CALL)
    assert shut.value.headers["Retry-After"]
    await asyncio.wait_for(supervisor.ready(60), 60)
    keeping.cancel()


@pytest.mark.parametrize(("path", "what"), [("/die", "exit code 9"), ("/hang", "SGLang hangs: 1 requests wait")])
async def test_it_is_started_again(supervisor, upstream, starts, capsys, path, what):
    await kept(supervisor, upstream, path)
    assert supervisor.restarts == 1
    assert what in supervisor.last_failure
    assert "starting it again" in capsys.readouterr().err
    assert (await upstream.ask("/generate", CALL)).status_code == 200
    first, second = starts.read_text().splitlines()
    assert first.split()[0] != second.split()[0]
    assert (supervisor.engine.log.with_name("log.before")).exists()


@pytest.mark.parametrize("times", [1, 2, 3])
async def test_a_port_that_somebody_took_meanwhile_is_not_the_end(
    supervisor, upstream, monkeypatch, capsys, times: int
):
    """SGLang chooses nothing: it binds the port half a minute after it was free, and ends with exit code 3."""
    said = "ERROR:    [Errno 98] error while attempting to bind on address ('127.0.0.1', 1): address already in use"
    begin, ports = engines.start, list[int]()

    def start(config: EngineConfig, log: Path) -> Engine:
        ports.append(config.port)
        if len(ports) > times:
            return begin(config, log)
        with log.open("wb") as output:
            process = spawn([sys.executable, "-c", f"print({said!r}); raise SystemExit(3)"], stdout=output)
        return Engine(process, config, log)

    monkeypatch.setattr(engines, "start", start)
    if times == 3:
        with pytest.raises(EngineError, match=r"did not start: error while .*: address already in use$"):
            await supervisor.start()
        return
    await supervisor.start()
    assert (await upstream.ask("/generate", CALL)).status_code == 200
    assert len(set(ports)) == times + 1
    assert capsys.readouterr().err.count("on another one") == times
    assert supervisor.restarts == 0


async def test_who_is_slow_does_not_hang(supervisor, upstream):
    """Nothing comes for three times as long as is allowed, but the engine says that it works."""
    await supervisor.start()
    keeping = asyncio.create_task(supervisor.keep())
    assert (await upstream.ask("/slow", CALL)).status_code == 200
    assert supervisor.restarts == 0
    keeping.cancel()


async def test_an_idle_engine_is_left_alone(supervisor, upstream):
    await supervisor.start()
    keeping = asyncio.create_task(supervisor.keep())
    await asyncio.sleep(3)
    assert (supervisor.restarts, upstream.waiting) == (0, 0)
    keeping.cancel()


@pytest.mark.parametrize("good_starts", [1])
async def test_it_is_given_up_with_the_last_reason(supervisor, upstream, starts, monkeypatch):
    waits: list[float] = []
    sleep = asyncio.sleep

    async def quick(delay_s: float) -> None:
        waits.append(delay_s)
        await sleep(min(delay_s, 0.05))

    await supervisor.start()
    monkeypatch.setattr(supervisors.asyncio, "sleep", quick)
    with pytest.raises(EngineError, match="did not start: OutOfMemoryError: CUDA out of memory"):
        await asyncio.gather(supervisor.keep(), asyncio.wait_for(_die(upstream), 60))
    assert len(starts.read_text().splitlines()) == 3
    assert [wait for wait in waits if wait >= 1] == [1.0]


async def test_hangs_in_a_row_are_given_up_however_long_each_took_to_notice(supervisor, upstream, starts, monkeypatch):
    monkeypatch.setattr(supervisors, "_SERVED_WELL_S", 0.5)  # an engine is up for longer until a hang is noticed
    await supervisor.start()
    keeping = asyncio.create_task(supervisor.keep())
    for _ in range(2):
        with pytest.raises(Refusal):
            await upstream.ask("/hang", CALL)
        await asyncio.wait_for(supervisor.ready(60), 60)
        await asyncio.sleep(0.6)  # nobody asks it: that is not serving
    with pytest.raises(Refusal):
        await upstream.ask("/hang", CALL)
    with pytest.raises(EngineError, match="SGLang hangs: 1 requests wait"):
        await asyncio.wait_for(keeping, 10)
    assert len(starts.read_text().splitlines()) == 3


async def test_a_hang_after_it_served_well_is_the_first_again(supervisor, upstream, monkeypatch):
    monkeypatch.setattr(supervisors, "_SERVED_WELL_S", 0.5)
    await supervisor.start()
    keeping = asyncio.create_task(supervisor.keep())
    for _ in range(3):
        await asyncio.sleep(0.6)
        await upstream.ask("/generate", CALL)
        with pytest.raises(Refusal):
            await upstream.ask("/hang", CALL)
        await asyncio.wait_for(supervisor.ready(60), 60)
    assert supervisor.restarts == 3
    keeping.cancel()


async def test_clients_that_lose_patience_one_after_the_other_hide_no_hang(supervisor, upstream):
    await supervisor.start()
    keeping = asyncio.create_task(supervisor.keep())
    until = time.monotonic() + 15
    with contextlib.suppress(Refusal):  # of the first that finds no engine
        while time.monotonic() < until:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(upstream.ask("/hang", CALL), 0.5)
    await asyncio.wait_for(supervisor.ready(60), 60)
    assert "SGLang hangs" in supervisor.last_failure
    keeping.cancel()


async def test_the_engine_is_not_asked_for_longer_than_it_has_to_answer(supervisor, upstream, monkeypatch):
    monkeypatch.setattr(supervisors, "ASKED_S", 0.3)
    given: list[float] = []

    async def is_working(timeout_s: float) -> bool:
        given.append(timeout_s)
        return False

    monkeypatch.setattr(upstream, "is_working", is_working)
    await kept(supervisor, upstream, "/hang")
    assert given == [0.3]
    assert Patience(hang_s=0.2).asked_s == 0.2


@pytest.mark.parametrize("good_starts", [0])
async def test_a_first_start_that_fails_is_not_tried_again(supervisor, starts):
    with pytest.raises(EngineError, match="CUDA out of memory"):
        await supervisor.start()
    assert len(starts.read_text().splitlines()) == 1


async def test_a_stop_while_it_starts(supervisor):
    starting = asyncio.create_task(supervisor.start())
    await asyncio.sleep(0.05)
    await asyncio.to_thread(supervisor.stop)
    with pytest.raises(EngineError):
        await asyncio.wait_for(starting, 10)
    assert supervisor.engine.process.poll() is not None


async def test_what_comes_back_counts_as_progress(supervisor, upstream):
    await supervisor.start()
    before = time.monotonic()
    await upstream.ask("/generate", CALL)
    assert upstream.heard_at >= before
    assert upstream.waiting == 0


@pytest.mark.parametrize(
    ("path", "why"),
    [("/die", r"SGLang died while serving: it ended with exit code 9"), ("/hang", "SGLang hangs: 1 req")],
)
@pytest.mark.parametrize("broken_off_is_said", [True, False])
async def test_an_engine_that_fails_while_versions_are_verified_ends_the_start(
    supervisor, upstream, starts, tmp_path, path, why, broken_off_is_said
):
    async def verify_again() -> None:
        try:
            await upstream.ask(path, CALL)
        except Refusal as error:
            if broken_off_is_said:
                raise EngineError("the engine broke off") from error
        await asyncio.sleep(60)

    catalog = Catalog("merged", (CALL.entry,))
    parts = Parts(Routes(CALL.entry), Metrics(Live), upstream, supervisor, Live, verify_again=verify_again)
    server = _Server(catalog, Serve(), Files(tmp_path / "log"), Access(Keyring(tmp_path / "keys.json")), parts)
    with pytest.raises(EngineError, match=why):
        await asyncio.wait_for(server._begin(), 30)
    assert not server.ready
    assert supervisor.restarts == 0
    assert len(starts.read_text().splitlines()) == 1


@pytest.mark.parametrize("error", [None, ParityError("another model")])
async def test_what_verification_finds_is_said_and_nothing_watches_any_more(supervisor, upstream, tmp_path, error):
    async def verify_again() -> None:
        if error:
            raise error

    catalog = Catalog("base", (CALL.entry,))
    parts = Parts(Routes(CALL.entry), Metrics(Live), upstream, supervisor, Live, verify_again=verify_again)
    server = _Server(catalog, Serve(), Files(tmp_path / "log"), Access(Keyring(tmp_path / "keys.json")), parts)
    tasks = asyncio.all_tasks()
    with pytest.raises(ParityError) if error else contextlib.nullcontext():
        await asyncio.wait_for(server._begin(), 30)
    assert server.ready is (error is None)
    assert asyncio.all_tasks() == tasks


async def _die(upstream: Upstream) -> None:
    with pytest.raises((Refusal, aiohttp.ClientError)):
        await upstream.ask("/die", CALL)
