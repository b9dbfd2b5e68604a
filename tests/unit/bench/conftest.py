"""A real HTTP server in a thread that streams chat completions on a schedule we know, and fails in ways we choose."""

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web

from tuneship.core.report import ClientHealth, EvalResult, LoadResult, Percentiles, Report, Testbed

Reply = Callable[[dict[str, Any]], str]


@dataclass
class Behaviour:
    """How one model answers: text after `ttft_s`, then every `itl_s`; or with `fault`, some of it after two chunks."""

    ttft_s: float = 0.0
    itl_s: float = 0.0
    fault: str = ""
    slots: int = 0
    """How many it answers at once, the others wait; 0 is all of them."""
    reply: Reply = lambda _body: "ok"
    """What a request that is not streamed is answered."""
    nats: float | None = None
    """How surprised it is by any token that it is asked to score; None: it has no scoring verb."""
    parent: str = ""
    """Of an adapter its base."""


STEADY = Behaviour(ttft_s=0.04, itl_s=0.02)
TRUTH = Behaviour(ttft_s=0.3, itl_s=0.02)
TWICE_AS_SLOW = Behaviour(ttft_s=0.6, itl_s=0.04)
TWENTY_A_SECOND = Behaviour(ttft_s=0.3, slots=6)


@dataclass
class StreamingServer:
    """`url` answers `/v1/models` and `/v1/chat/completions` with the behaviour set for the model asked for."""

    behaviours: dict[str, Behaviour] = field(default_factory=dict)
    arrived_s: list[float] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    """The `Authorization` of each."""
    owner: str = "test"
    in_flight: int = 0
    most_in_flight: int = 0
    url: str = ""
    _gates: dict[str, asyncio.Semaphore] = field(default_factory=dict)

    async def models(self, request: web.Request) -> web.Response:
        if "secret" in self.behaviours and request.headers.get("Authorization") != "Bearer sesame":
            return web.json_response({"error": {"message": "no"}}, status=401)
        data = [
            {"id": name, "object": "model", "created": 0, "owned_by": self.owner, "parent": how.parent or None}
            for name, how in self.behaviours.items()
        ]
        return web.json_response({"object": "list", "data": data})

    async def model(self, request: web.Request) -> web.Response:
        """As our door answers: also for a version, `steady@1`, which it does not list."""
        name = request.match_info["name"]
        if name.partition("@")[0] not in self.behaviours:
            return web.json_response({"error": {"message": "no"}}, status=404)
        return web.json_response({"id": name, "object": "model", "created": 0, "owned_by": "test"})

    async def logprobs(self, request: web.Request) -> web.Response:
        body = await request.json()
        nats = self.behaviours[body["model"]].nats
        if nats is None:
            return web.json_response({"detail": "Not Found"}, status=404)
        rows = zip(body["input_ids"], body["start"], strict=True)
        return web.json_response({"data": [{"token_logprobs": [-nats for _ in ids[start:]]} for ids, start in rows]})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        started = time.perf_counter()
        body = await request.json()
        self.arrived_s.append(started)
        self.bodies.append(body)
        self.keys.append(request.headers.get("Authorization", ""))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            how = self.behaviours[body["model"]]
            if not how.slots:
                return await self._answer(request, body, how, started)
            async with self._gates.setdefault(body["model"], asyncio.Semaphore(how.slots)):
                return await self._answer(request, body, how, time.perf_counter())
        finally:
            self.in_flight -= 1

    async def _answer(
        self, request: web.Request, body: dict[str, Any], how: Behaviour, started: float
    ) -> web.StreamResponse:
        if how.fault.startswith("http_"):
            return web.json_response({"error": {"message": "so it was asked"}}, status=int(how.fault[5:]))
        if how.fault == "hang":
            await asyncio.sleep(60)
        if not body.get("stream"):
            await asyncio.sleep(how.ttft_s)
            message = {"role": "assistant", "content": how.reply(body)}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            return web.json_response(_chunk(body, object="chat.completion", choices=[choice]))
        return await self._stream(request, body, how, started)

    async def _stream(
        self, request: web.Request, body: dict[str, Any], how: Behaviour, started: float
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b": a comment\n\n" + _event(_delta(body, role="assistant", content="")))
        for index in range(body["max_tokens"]):
            wait = started + how.ttft_s + index * how.itl_s - time.perf_counter()
            await asyncio.sleep(max(0.0, wait))
            if index == 2 and how.fault == "error mid-stream":
                await response.write(b'data: {"error": {"message": "out of memory", "code": 500}}\n\n')
                return response
            if index == 2 and how.fault == "abort":
                await response.write(_event(_chunk(body, choices=[{"index": 0, "finish_reason": "abort"}])))
            if index == 2 and how.fault == "garbage":
                await response.write(b"data: <html>Bad Gateway</html>\n\n")
            if index == 2 and how.fault == "close":
                request.transport.close()
                return response
            if index == 2 and how.fault == "end without done":
                return response
            text = "" if how.fault == "no text" else "word "
            await response.write(_event(_delta(body, content=text)))
        if how.fault != "no usage":
            tokens = {"prompt_tokens": 7, "completion_tokens": body["max_tokens"]}
            usage = {**tokens, "total_tokens": sum(tokens.values())}
            await response.write(_event(_chunk(body, choices=[], usage=usage)))
        await response.write(b"data: [DONE]\n\n")
        if how.fault == "hang after done":
            await asyncio.sleep(60)
        return response


def _chunk(body: dict[str, Any], **parts: Any) -> dict[str, Any]:
    return {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": body["model"], **parts}


def _delta(body: dict[str, Any], **delta: str) -> dict[str, Any]:
    return _chunk(body, choices=[{"index": 0, "delta": delta, "finish_reason": None}])


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


async def _serve(server: StreamingServer, ready: threading.Event, stop: asyncio.Event) -> None:
    app = web.Application()
    app.router.add_get("/v1/models", server.models)
    app.router.add_get("/v1/models/{name}", server.model)
    app.router.add_post("/v1/chat/completions", server.chat)
    app.router.add_post("/v1/logprobs", server.logprobs)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0]
    server.url = f"http://{host}:{port}"
    ready.set()
    with contextlib.suppress(asyncio.CancelledError):
        await stop.wait()
    await runner.cleanup()


def _serve_until_killed() -> None:
    server = StreamingServer({"truth": TRUTH, "slow": TWICE_AS_SLOW, "limited": TWENTY_A_SECOND})
    ready = threading.Event()
    threading.Thread(target=lambda: ready.wait() and print(server.url, flush=True), daemon=True).start()
    asyncio.run(_serve(server, ready, asyncio.Event()))


@pytest.fixture
def separate_server() -> Iterator[str]:
    """URL of such a server in a process of its own, with models of its own: its GIL is not the client's."""
    process = subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.communicate()


@pytest.fixture
def server() -> Iterator[StreamingServer]:
    """The server, with one well-behaved model `steady`: 40 ms to the first text, then 20 ms a chunk."""
    server = StreamingServer({"steady": STEADY})
    loop, stop, ready = asyncio.new_event_loop(), asyncio.Event(), threading.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(_serve(server, ready, stop),))
    thread.start()
    assert ready.wait(10)
    yield server
    loop.call_soon_threadsafe(stop.set)
    thread.join(10)
    loop.close()
    assert not thread.is_alive()


@pytest.fixture
def make_report() -> Callable[..., Report]:
    """A report of made-up but plausible figures; keyword arguments replace what `Report` has."""
    return example_report


def example_report(**changes: Any) -> Report:
    testbed = Testbed.build(
        gpu="none", cpu="Test CPU, 2 cores", driver="", versions={"sglang": "0.5.17"}, flags=["--x 1"]
    )
    evals = [example_eval(role="base", score=0.25), example_eval(role="tuned", score=0.9)]
    parts = {"name": "invoice-json", "created_at": "2026-01-02 03:04:05 UTC", "testbed": testbed}
    return Report(**(parts | {"load": [example_level(1), example_level(4)], "eval": evals} | changes))


def example_level(rate: float = 4, slower: float = 1.0, **changes: Any) -> LoadResult:
    def latency(p50: float) -> Percentiles:
        p50 *= slower
        return Percentiles(p50=p50, p90=p50 * 2, p95=p50 * 2.2, p99=p50 * 3, mean=p50 * 1.1)

    medians = {"ttft_ms": 80.0 + rate, "tpot_ms": 21.5, "itl_ms": 20.0, "e2e_ms": 1400.0}
    parts = {
        "workload": "fixed 128 in, 64 out",
        "model": "invoice-json",
        "arrivals": "poisson",
        "rate": rate,
        "requests": 40,
        "completed": 40,
        "duration_s": 30.0,
        "input_tokens": 5120,
        "output_tokens": 2560,
        "output_tokens_per_s": 85.3 / slower,
        "client": ClientHealth(lag_p99_ms=0.8, valid=True),
        "samples": {name: [p50 * slower * (0.5 + i / 40) for i in range(80)] for name, p50 in medians.items()},
        **{name: latency(p50) for name, p50 in medians.items()},
    }
    return LoadResult(**(parts | changes))


def example_eval(**changes: Any) -> EvalResult:
    parts = {"task": "json-fields", "data": "/data/invoice.heldout.jsonl", "model": "m", "role": "tuned", "items": 200}
    return EvalResult(**(parts | {"score": 0.9, "stderr": 0.02, "items_file": "items.jsonl"} | changes))


@pytest.fixture
def make_level() -> Callable[..., LoadResult]:
    """One load level; `slower` stretches its latencies."""
    return example_level


@pytest.fixture
def make_eval() -> Callable[..., EvalResult]:
    """One task's result."""
    return example_eval


@pytest.fixture
def behaviour() -> type[Behaviour]:
    """To give the server another model."""
    return Behaviour


if __name__ == "__main__":
    _serve_until_killed()
