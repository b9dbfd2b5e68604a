"""`tuneship top`: figures from two answers, the screen that they make, and a server that goes away."""

from __future__ import annotations

import io
import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from inline_snapshot import snapshot
from rich.console import Console

from tuneship.core.errors import EndpointError
from tuneship.serve.metrics import Answer, Live, Metrics
from tuneship.serve.running import Running
from tuneship.serve.screen import Sample, render
from tuneship.serve.status import Counts, Histogram, Status
from tuneship.serve.top import fetch, watch

BASE, OLD, NEW, BAD = "org/base@1f00aa22bb33", "sql@3fa9c1d20b77", "sql@77aa00112233", "sum@aaaabbbbcccc"


class Server:
    """What a server would say, from real counts."""

    def __init__(self) -> None:
        self.metrics = Metrics(lambda: Live(in_flight={OLD: 2, BASE: 1}))
        self.metrics.serving([BASE, OLD, NEW, BAD])
        self.engine = {"state": "ready", "pid": 4711, "url": "", "restarts": 0, "up_s": 7384.0, "last_failure": ""}
        self.slots = {"total": 9, "wanted": 4, "misses_per_minute": 0.0, "thrashing": False}

    def answers(self, version: str, count: int, ttft_s: float = 0.05, status: int = 200) -> None:
        for _ in range(count):
            self.metrics.answered(Answer(version, status, e2e_s=1.0, ttft_s=ttft_s, completion_tokens=20))

    def said(self) -> dict[str, Any]:
        def version(name: str, state: str, **more: object) -> dict[str, Any]:
            alias = name.rpartition("@")[0]
            return {"alias": alias, "version": name, "state": state, "weight": 0.0, "pinned": False} | more

        return {
            "engine": self.engine,
            "slots": self.slots,
            "in_flight": 3,
            "versions": [
                version(BAD, "loaded", verified="failed: another adapter answered", in_flight=0),
                version(NEW, "canary", weight=0.05, verified="passed", in_flight=0),
                version(OLD, "live", weight=0.95, pinned=True, verified="passed", in_flight=2),
                version("sql@000000000000", "unloaded", verified="passed", in_flight=0),
            ],
            "metrics": self.metrics.snapshot(),
        }

    def sample(self, at: float) -> Sample:
        return Sample(at, Status.model_validate_json(json.dumps(self.said())))


def text(*samples: Sample, problem: str = "", width: int = 110) -> list[str]:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(render(samples, problem))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_one_answer_is_sums():
    server = Server()
    server.answers(OLD, 30)
    server.answers(NEW, 2, ttft_s=0.3)
    server.answers(OLD, 1, status=503)
    assert text(server.sample(0)) == snapshot(
        [
            "engine ready   up 2 h 3 min   restarts 0   pid 4711",
            "in flight 3   33 requests   660 tokens",
            "slots 8 for adapters, 1 for the base   last minute: adapters asked for 3, requests that waited 0",
            "",
            "                                                   in              TTFT ms",
            "version                state           weight  flight  requests  p50 / p99  tokens  errors",
            "org/base@1f00aa22bb33  base                 -       1         0          -       0       0",
            "sql@3fa9c1d20b77       live, pinned       95%       2        31    40 / 50     620   503:1",
            "sql@77aa00112233       canary              5%       0         2  250 / 299      40       0",
            "sum@aaaabbbbcccc       loaded, failed       -       0         0          -       0       0",
            "since each is served",
            "slot: where an adapter must lie to answer, copied there when asked   loaded: answers its full name alone",
        ]
    )


def test_more_answers_are_rates():
    server = Server()
    server.answers(OLD, 1000, ttft_s=2.0)
    server.answers(OLD, 7, status=503)
    first = server.sample(0)
    server.answers(OLD, 50)
    middle = server.sample(45)
    server.answers(OLD, 40)
    server.answers(OLD, 3, status=499)
    server.answers(NEW, 5, ttft_s=500.0)
    server.engine |= {"restarts": 1, "last_failure": "SGLang died while serving: out of memory"}
    server.slots |= {"wanted": 12, "misses_per_minute": 31.0, "thrashing": True}
    assert text(first, middle, server.sample(50)) == snapshot(
        [
            "engine ready   up 2 h 3 min   restarts 1   pid 4711",
            "in flight 3   9.6 requests/s   192 tokens/s",
            "slots 8 for adapters, 1 for the base   last minute: adapters asked for 11, requests that waited 31",
            "adapters wait for slots: restart with --max-loras 11, or pin what is asked for most",
            "last failure: SGLang died while serving: out of memory",
            "",
            "                                                   in           TTFT ms",
            "version                state           weight  flight  req/s  p50 / p99  tok/s  errors",
            "org/base@1f00aa22bb33  base                 -       1      0          -      0       0",
            "sql@3fa9c1d20b77       live, pinned       95%       2    8.6    40 / 50    172   499:3",
            "sql@77aa00112233       canary              5%       0      1  inf / inf     20       0",
            "sum@aaaabbbbcccc       loaded, failed       -       0      0          -      0       0",
            "req/s and tok/s: last 10 s; TTFT and errors: last minute",
            "slot: where an adapter must lie to answer, copied there when asked   loaded: answers its full name alone",
        ]
    )


def test_what_streams_do_not_tell_is_said_to_be_about_so_much():
    server = Server()
    server.answers(NEW, 1)
    first = server.sample(0)
    server.answers(NEW, 1)
    server.metrics.answered(Answer(OLD, 200, chunks=170))
    lines = text(first, server.sample(10))
    assert lines[1].startswith("in flight 3   0.2 requests/s   ~19 tokens/s")
    tokens = {line.split()[0]: line.split()[-2] for line in lines[-6:-2]}
    assert tokens == {BASE: "0", OLD: "~17", NEW: "2", BAD: "0"}


def test_a_narrow_terminal_keeps_the_figures():
    server = Server()
    server.answers(OLD, 30)
    lines = text(server.sample(0), width=80)
    assert all(len(line) <= 80 for line in lines)
    (row,) = [line for line in lines if line.startswith("sql@3fa9")]
    assert row.split()[-7:] == ["2", "30", "40", "/", "50", "600", "0"]


def test_a_version_that_was_made_anew_starts_again():
    server = Server()
    server.answers(OLD, 100)
    first = server.sample(0)
    server.metrics.serving([BASE])
    server.metrics.serving([BASE, OLD])
    server.answers(OLD, 30)
    lines = text(first, server.sample(10))
    (row,) = [line for line in lines if line.startswith(OLD)]
    assert row.split()[5] == "3"


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.99])
def test_quantiles_are_as_near_as_the_buckets(share: float):
    values = np.random.default_rng(0).lognormal(-2, 0.7, 5000)
    metrics = Metrics(Live)
    metrics.serving([OLD])
    for value in values:
        metrics.answered(Answer(OLD, 200, ttft_s=value))
    estimate = (
        Status(engine={"state": "ready"}, metrics={OLD: Counts.model_validate(metrics.snapshot()[OLD])})
        .metrics[OLD]
        .ttft_s.quantile(share)
    )
    assert estimate == pytest.approx(np.quantile(values, share), rel=0.2)


def test_quantiles_of_little():
    assert Histogram().quantile(0.5) == math.inf
    above = Histogram(buckets=((1.0, 0), (2.0, 0)), count=3)
    assert above.quantile(0.5) == math.inf
    assert Histogram(buckets=((1.0, 0), (2.0, 1), (3.0, 1)), count=1).quantile(0.99) == pytest.approx(1.99)


class Handler(BaseHTTPRequestHandler):
    said: bytes
    asked = 0

    def do_GET(self) -> None:
        type(self).asked += 1
        right = self.headers["Authorization"] == "Bearer secret" and self.path == "/admin/status"
        self.send_response(200 if right else 401)
        self.end_headers()
        self.wfile.write(self.said if right else b"{}")

    def log_message(self, *_: object) -> None:
        pass


def at(url: str, key: str = "secret") -> Running:
    return Running(url="", admin_url=url, admin_key=key)


@pytest.fixture
def admin() -> Iterator[tuple[type[Handler], str]]:
    handler = type("OwnHandler", (Handler,), {"said": json.dumps(Server().said()).encode()})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield handler, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_status_comes_with_the_key_alone(admin):
    _, url = admin
    assert fetch(at(url)).engine.pid == 4711
    with pytest.raises(EndpointError, match="refuses this admin key") as caught:
        fetch(at(url, "wrong"))
    assert "TUNESHIP_ADMIN_KEY" in caught.value.hint


@pytest.mark.parametrize("said", [b"", b"<html>", b"[]", b'{"engine": {}}'])
def test_an_answer_of_something_else(admin, said: bytes):
    handler, url = admin
    handler.said = said
    with pytest.raises(EndpointError, match="does not answer as a server's admin side"):
        fetch(at(url))


def test_nobody_there():
    with pytest.raises(EndpointError, match="does not answer"):
        fetch(at("http://127.0.0.1:9"))


def test_the_screen_outlives_its_server(admin):
    """Three answers, then two failures, then Ctrl-C."""
    handler, url = admin
    calls = []

    def ask() -> Status:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return fetch(at(url if len(calls) <= 3 else "http://127.0.0.1:9"))

    console = Console(file=io.StringIO(), force_terminal=True, width=110, height=30, legacy_windows=False)
    with pytest.raises(KeyboardInterrupt):
        watch(ask, console, every_s=0.01)
    drawn = console.file.getvalue()
    assert handler.asked == 3
    assert "requests/s" in drawn
    assert "127.0.0.1:9 does not answer" in drawn
    assert drawn.rindex(OLD) > drawn.index("does not answer")
