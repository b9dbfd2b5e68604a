"""The load generator against a server whose schedule is known: it must measure that schedule, or say that it failed."""

import asyncio
import json
import time

import numpy as np
import pytest
import uvloop

from tuneship.bench.load import drive as load
from tuneship.bench.load import metrics, processes, stream
from tuneship.bench.load.drive import Recording
from tuneship.bench.load.measure import LoadPlan, measure
from tuneship.bench.load.stream import RequestRecord
from tuneship.bench.load.workload import Request
from tuneship.bench.target import resolve
from tuneship.core.errors import EndpointError

_MESSAGES = [{"role": "user", "content": "a few words"}]
_USAGE = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}}


def _drive(url: str, requests: list[Request], drain_s: float = 10) -> Recording:
    async def go() -> Recording:
        async with load.connect() as session:
            return await load.drive(session, url, requests, drain_s=drain_s)

    return uvloop.run(go())


def _at_once(model: str, count: int = 1, tokens: int = 5) -> list[Request]:
    return [Request(0.0, model, _MESSAGES, tokens)] * count


@pytest.mark.timing
@pytest.mark.parametrize("streams", [1, 32])
def test_measures_the_schedule_of_the_server(separate_server, streams: int) -> None:
    async def go() -> Recording:
        async with load.connect() as session:
            await load.drive(session, separate_server, _at_once("truth", streams, tokens=1), drain_s=10)  # warm-up
            requests = [Request(index * 0.02, "truth", _MESSAGES, 50) for index in range(streams)]
            return await load.drive(session, separate_server, requests, drain_s=10)

    result = metrics.summarise(uvloop.run(go()), workload="w", model="truth", arrivals="constant", rate=50)
    assert (result.completed, result.errors) == (streams, {})
    assert (result.input_tokens, result.output_tokens) == (7 * streams, 50 * streams)
    for latency, truth_ms in ((result.ttft_ms, 300), (result.itl_ms, 20), (result.tpot_ms, 20), (result.e2e_ms, 1280)):
        assert latency.p50 == pytest.approx(truth_ms, rel=0.05)
    assert result.duration_s == pytest.approx(1.28 + 0.02 * (streams - 1), abs=0.2)
    assert result.output_tokens_per_s == pytest.approx(50 * streams / result.duration_s)


@pytest.mark.timing
def test_sends_on_schedule_while_nothing_is_answered(server, behaviour) -> None:
    server.behaviours["slow"] = behaviour(ttft_s=1.5)
    requests = [Request(index * 0.05, "slow", _MESSAGES, 1) for index in range(20)]
    recording = _drive(server.url, requests)
    assert server.most_in_flight == 20  # a closed loop would never get there
    sent = [record.sent_s for record in recording.records]
    assert np.median(np.subtract(sent, [r.at_s for r in requests])) < 0.005
    arrived = np.subtract(server.arrived_s, server.arrived_s[0])
    assert np.median(np.abs(arrived - [r.at_s for r in requests])) < 0.025


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("http_429", "http_429"),
        ("http_500", "http_500"),
        ("error mid-stream", "stream_error"),
        ("abort", "stream_error"),
        ("garbage", "stream_error"),
        ("close", "stream_closed"),
        ("end without done", "stream_closed"),
        ("no usage", "missing_usage"),
        ("no text", "no_content"),
        ("hang", "timeout"),
    ],
)
def test_errors_by_kind(server, behaviour, fault: str, kind: str) -> None:
    server.behaviours["bad"] = behaviour(fault=fault)
    recording = _drive(server.url, _at_once("bad", 3) + _at_once("steady", 2), drain_s=1)
    result = metrics.summarise(recording, workload="w", model="m", arrivals="constant", rate=1)
    assert result.errors == {kind: 3}
    assert result.completed == 2
    assert result.output_tokens == 10  # a broken answer's tokens do not count
    assert all(record.detail for record in recording.records if record.error)


def test_nobody_listens() -> None:
    recording = _drive("http://127.0.0.1:9", _at_once("any", 2))
    assert [record.error for record in recording.records] == ["connection"] * 2
    result = metrics.summarise(recording, workload="w", model="m", arrivals="constant", rate=1)
    assert result.ttft_ms is None
    assert result.output_tokens_per_s == 0


def test_a_hung_server_ends_with_the_deadline(server, behaviour) -> None:
    server.behaviours["hung"] = behaviour(fault="hang")
    started = time.perf_counter()
    recording = _drive(server.url, _at_once("hung", 50), drain_s=0.5)
    assert time.perf_counter() - started < 3
    assert {record.error for record in recording.records} == {"timeout"}
    assert all(record.end_s == pytest.approx(0.5, abs=0.3) for record in recording.records)


def test_an_answer_is_complete_at_done_even_if_the_connection_lingers(server, behaviour) -> None:
    server.behaviours["lingering"] = behaviour(fault="hang after done")
    record = _drive(server.url, _at_once("lingering"), drain_s=0.5).records[0]
    assert record.error == ""
    assert record.end_s < 0.3


def test_a_busy_client_says_that_it_cannot_be_believed(server) -> None:
    async def go() -> Recording:
        async with load.connect() as session:
            asyncio.get_running_loop().call_later(0.02, time.sleep, 0.2)  # what blocks the loop delays every timestamp
            return await load.drive(session, server.url, _at_once("steady", 1, tokens=3), drain_s=5)

    result = metrics.summarise(uvloop.run(go()), workload="w", model="m", arrivals="constant", rate=1)
    assert result.client.lag_p99_ms > 100
    assert not result.client.valid


def test_levels_of_several_models(server, behaviour, capsys) -> None:
    server.behaviours["other"] = behaviour(ttft_s=0.1, itl_s=0.01)
    target = resolve(server.url, "steady,other")
    result, _ = measure(target, LoadPlan((20, 10), 1.5, "poisson", 16, 3, drain_s=5)).levels
    assert (result.arrivals, result.rate, result.workload) == ("poisson", 20, "fixed 16 in, 3 out")
    assert result.completed == result.requests
    assert set(result.per_adapter) == {"steady", "other"}
    assert result.per_adapter["other"]["ttft_ms_p50"] > result.per_adapter["steady"]["ttft_ms_p50"] + 30
    assert sum(row["requests"] for row in result.per_adapter.values()) == result.requests
    assert all(body["ignore_eos"] and body["stream_options"] == {"include_usage": True} for body in server.bodies)
    assert "load 20/s" in capsys.readouterr().err


def test_a_closed_loop_keeps_its_number_in_flight_and_stops(server) -> None:
    requests = _at_once("steady", 100, tokens=3)  # 80 ms each
    recording = processes.run(server.url, "", requests, drain_s=5, concurrency=4, stop_s=0.5)
    assert server.most_in_flight == 4
    assert 8 <= len(recording.records) == len(server.bodies) <= 28
    assert {record.error for record in recording.records} == {""}
    scheduled = [record.scheduled_s for record in recording.records]
    assert scheduled == sorted(scheduled)
    assert scheduled[-1] < 0.5
    assert all(body["messages"] == _MESSAGES for body in server.bodies)
    assert all(0 <= record.sent_s - record.scheduled_s < 0.05 for record in recording.records)
    assert recording.cpu_s > 0


def test_a_closed_loop_on_a_hung_server_ends(server, behaviour) -> None:
    server.behaviours["hung"] = behaviour(fault="hang")
    recording = processes.run(server.url, "", _at_once("hung", 9), drain_s=0.3, concurrency=2)
    assert [record.error for record in recording.records] == ["timeout"] * 2


def test_what_is_due_after_the_stop_is_not_sent(server) -> None:
    requests = [Request(index * 0.1, "steady", _MESSAGES, 1) for index in range(10)]
    recording = processes.run(server.url, "", requests, drain_s=5, stop_s=0.35)
    assert len(recording.records) == len(server.bodies) == 4


@pytest.mark.timing
def test_several_processes_send_one_schedule(server) -> None:
    seen: list[list[bool]] = []
    requests = [Request(index * 0.05, "steady", _MESSAGES, 3) for index in range(30)]
    recording = processes.run(
        server.url, "", requests, drain_s=5, processes=3, watch=lambda _now, records: seen.append([*map(bool, records)])
    )
    assert [record.scheduled_s for record in recording.records] == [request.at_s for request in requests]
    assert {record.error for record in recording.records} == {""}
    arrived = np.subtract(server.arrived_s, recording.records[0].sent_s)
    assert np.median(np.abs(np.diff(arrived) - 0.05)) < 0.02  # one clock: the hands interleave as they were dealt
    assert (recording.processes, len(recording.loop_lag_s) > 300) == (3, True)
    assert recording.cpu_s > 0
    assert seen
    assert {len(records) for records in seen} == {30}


def test_several_processes_share_a_concurrency(server) -> None:
    recording = processes.run(server.url, "", _at_once("steady", 20), drain_s=5, processes=8, concurrency=3)
    assert (recording.processes, len(recording.records)) == (3, 20)
    assert server.most_in_flight == 3


@pytest.mark.parametrize(
    "delta",
    [
        {"content": "x"},
        {"content": None, "reasoning_content": "hm"},
        {"reasoning": "hm"},
        {"tool_calls": [{"index": 0, "function": {"arguments": "{"}}], "unknown": [1]},
    ],
)
def test_what_carries_a_token(delta: dict) -> None:
    record = _take_all({"choices": [{"index": 0, "delta": delta, "new": {}}], "usage": None}, _USAGE)
    assert (record.error, record.chunks_s) == ("", [0.0])
    assert (record.input_tokens, record.output_tokens) == (7, 5)


def test_tokens_without_text_have_no_first_token() -> None:
    silent = {"choices": [{"delta": {"role": "assistant", "content": "", "tool_calls": []}}]}
    record = _take_all(silent, _USAGE)
    assert record.error == "no_content"
    assert "of 5 tokens" in record.detail
    assert _take_all(silent, {"usage": {"prompt_tokens": 7, "completion_tokens": 0}}).error == "no_content"
    assert _take_all(silent, {"usage": {}}).error == "missing_usage"


def test_half_a_character_is_text() -> None:
    record = RequestRecord("m", 0.0)
    stream._take("message", b'{"choices": [{"delta": {"content": "\xe2\x82"}}]}', record, 1.0)
    assert record.chunks_s == [1.0]


def _take_all(*bodies: dict) -> RequestRecord:
    record = RequestRecord("m", 0.0)
    for at_s, data in enumerate([*(json.dumps(body).encode() for body in bodies), b"[DONE]"]):
        stream._take("message", data, record, float(at_s))
    return record


def test_a_silent_server_is_an_error_with_its_reason(server, behaviour) -> None:
    server.behaviours["broken"] = behaviour(fault="http_500")
    with pytest.raises(EndpointError, match=r"the warm-up: none of 4 requests .* http_500: .*so it was asked"):
        measure(resolve(server.url, "broken"), LoadPlan((5,), 1, "constant", 8, 2))
