"""A whole door, guard and all, before requests that no client should send: a few hundred of the study's 20,000.

And whatever fails, a prompt is written down nowhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import logging
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import psutil
import pytest
from aiohttp import web

from tests.unit.serve.listening import answering, listening
from tuneship.serve import bodies, keys, protocol
from tuneship.serve.catalog import Entry
from tuneship.serve.gateway import build_door
from tuneship.serve.guard import Guard, Limits
from tuneship.serve.keys import Keyring
from tuneship.serve.metrics import Live, Metrics
from tuneship.serve.observe import Observed
from tuneship.serve.protocol import DoorProtocol
from tuneship.serve.routes import Routes
from tuneship.serve.upstream import Upstream

STUDIES = Path(__file__).parents[3] / "bench" / "studies"
BASE = Entry("org/base", "org/base@1", None, Path("/b"), "", "b")
SECRET = "the-prompt-that-nobody-may-read"
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def study():
    """`bench/studies/malformed.py`, as when it is run: studies import their neighbours."""
    sys.path.append(str(STUDIES))
    spec = importlib.util.spec_from_file_location("malformed", STUDIES / "malformed.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(STUDIES))


class Engine:
    """Answers, or fails as `script` says, with what it was sent in every word."""

    script = "answer"

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.text()
        if self.script == "answer":
            return web.json_response(_scored(json.loads(body)) if request.path == "/generate" else {"choices": []})
        if self.script in {"400", "500"}:
            said = {"message": f"Traceback: cannot read {body} in /work/x/y.py"}
            return web.json_response(said, status=int(self.script))
        if self.script == "hang":
            await asyncio.sleep(30)
        if self.script in {"torn", "slow"}:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            await response.write(f"data: {body}\n\n".encode() + b"data: to")
            await asyncio.sleep(30 if self.script == "slow" else 0)
        request.transport.abort()
        return web.Response()


def _scored(asked: dict) -> list[dict]:
    """As SGLang answers when it is asked for the log-probabilities of prompts."""
    return [
        {"meta_info": {"input_token_logprobs": [(-1.0, token, None) for token in ids]}} for ids in asked["input_ids"]
    ]


@contextlib.asynccontextmanager
async def opened(engine: Engine, keyring: Keyring, limits: Limits) -> AsyncIterator[str]:
    app = web.Application(client_max_size=2 * bodies.MAX_BODY_BYTES)
    app.router.add_post("/{path:.*}", engine.handle)
    async with answering(app, handler_cancellation=True, access_log=None) as behind, Upstream(behind) as upstream:
        metrics = Metrics(Live)
        door = Observed(Guard(build_door(Routes(BASE, ()), upstream, metrics, lambda: True), keyring, limits), metrics)
        async with listening(door, access_log=False, http=DoorProtocol, ws="none") as (url, _):
            yield url


async def test_what_no_client_should_send(study, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(protocol, "REQUEST_WITHIN_S", 1.0)
    monkeypatch.setattr(bodies, "BODY_WITHIN_S", 1.0)
    caplog.set_level(logging.CRITICAL)  # uvicorn says of every one that it is no HTTP
    key = keys.add(tmp_path / "keys.toml", "test")
    cases = list(study.requests(380, 2, study.Target([BASE.name], key)))
    halves = [study.Malformed("half", half, unanswered=True) for half in study.halves(key)]
    files = psutil.Process().num_fds()
    async with opened(Engine(), Keyring(tmp_path / "keys.toml", {}), Limits()) as url:
        answers = await study.send_all(url, cases, 20)
        answers += await asyncio.gather(*(study.send(url, half, 20, hang_up=False) for half in halves))
    assert not Counter(f"{answer.kind}: {answer.fault}" for answer in answers if answer.fault)
    assert len(answers) == 384
    found = Counter(answer.status for answer in answers)
    for status in (0, 200, 400, 401, 404, 405, 408, 431):
        assert found[status], f"none of {status}: they are not as various as they were"
    assert psutil.Process().num_fds() - files < 8


def test_the_study_sees_what_is_wrong(study):
    case = study.Malformed("x", b"POST / HTTP/1.1\r\n\r\n")
    error = b'{"error": {"message": "m", "type": "t", "param": null, "code": "c"}}'
    head = b"HTTP/1.1 %d X\r\n\r\n"
    assert not study.judged(case, head % 400 + error).fault
    assert not study.judged(case, head % 502 + error).fault
    assert not study.judged(case._replace(unanswered=True), b"").fault
    orderly = [
        study.Malformed("x", study.http(path, json.dumps({"model": "m", **body}).encode(), "key"))
        for path, body in (
            ("/v1/completions", {"prompt": "a"}),
            ("/v1/completions", {"prompt": "a", "temperature": 0, "nonsense": [{}], "\u202e": None}),
            (CHAT, {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}),
            ("/v1/logprobs", {"input_ids": [[1, 2]]}),
        )
    ]
    for each in orderly:
        assert study.judged(each, head % 502 + error).fault == "502 c to a request in order"
        assert not study.judged(each, head % 400 + error).fault
        assert study.judged(each._replace(kind="in order"), head % 400 + error).fault
        assert not study.judged(each._replace(kind="in order"), b"HTTP/1.1 200 OK\r\n\r\n{}").fault
    for path, body in (
        ("/v1/completions", {"prompt": "a", "temperature": "0"}),
        ("/v1/completions", {"prompt": "a\ud83d"}),
        ("/v1/completions", {"prompt": "a", "no_stop_trim": [1]}),
        ("/v1/completions", {"prompt": ""}),
        (CHAT, {"messages": [{"role": "user"}]}),
        ("/v1/models", {"prompt": "a"}),
    ):
        sent = study.http(path, json.dumps({"model": "m", **body}).encode(), "key")
        assert not study.judged(study.Malformed("x", sent), head % 502 + error).fault, body
    cut = study.Malformed("x", orderly[0].sent[:-1])
    assert not study.judged(cut, head % 502 + error).fault
    for received in (
        b"",
        b"garbage",
        head % 500 + error,
        head % 503 + error,
        head % 400 + b"Invalid HTTP request received.",
        head % 400 + b'{"detail": "Not Found"}',
        head % 400 + error.replace(b'"m"', b'"/home/x/y"'),
        head % 400 + error.replace(b'"m"', b'"in x.py"'),
    ):
        assert study.judged(case, received).fault, received


@pytest.mark.parametrize("script", ["answer", "400", "500", "die", "torn", "slow", "hang"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_prompt_is_written_down_nowhere(tmp_path, capfd, caplog, monkeypatch, script, stream):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(bodies, "BODY_WITHIN_S", 0.3)
    key = keys.add(tmp_path / "keys.toml", "test")
    engine = Engine()
    engine.script = script
    message = [{"role": "user", "content": SECRET}]
    good = {"model": BASE.name, "messages": message, "stream": stream}
    async with (
        opened(engine, Keyring(tmp_path / "keys.toml", {}), Limits(request_s=1.0)) as url,
        aiohttp.ClientSession(url, headers={"Authorization": f"Bearer {key}"}) as door,
    ):
        for body in (
            json.dumps(good),
            json.dumps({**good, "model": SECRET}),
            json.dumps({**good, "lora_path": SECRET}),
            json.dumps({**good, "n": SECRET, SECRET: 1}),
            json.dumps({**good, "messages": SECRET}) + SECRET,
            f'{{"messages": "{SECRET}\ud83d"'.encode(errors="surrogatepass"),
        ):
            await (await door.post(CHAT, data=body)).read()
        wrong = {"Authorization": f"Bearer {SECRET}"}
        assert (await door.post(CHAT, json=good, headers=wrong)).status == 401
        await door.post(f"/v1/{SECRET}", json=good)
        with contextlib.suppress(TimeoutError):
            await (await door.post(CHAT, json=good, timeout=aiohttp.ClientTimeout(total=0.2))).read()
        with contextlib.suppress(aiohttp.ClientError):
            await door.post(CHAT, data=_drops(json.dumps(good).encode()))
        await door.post("/v1/logprobs", json={"model": BASE.name, "input_ids": [[1]], SECRET: SECRET})
    said = capfd.readouterr()
    # asyncio and aiohttp's own debug lines would show it, if it were in an exception or a task's name.
    assert SECRET not in said.out + said.err + caplog.text
    assert "Traceback" not in said.out + said.err


async def _drops(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), 10):
        yield body[start : start + 10]
        await asyncio.sleep(0.1)
