"""Held-out likelihood against a real server whose figures are known: token t has the log-probability -t / 10."""

from __future__ import annotations

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from tuneship.bench.quality.nll import CannotScore, Scored, clustered_mean, measure_nll
from tuneship.bench.target import Target
from tuneship.core.errors import DataError, EndpointError

END = 90


class _Door(BaseHTTPRequestHandler):
    rows_asked: ClassVar[list[int]] = []
    refusals: ClassVar[list[int]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body["model"] == "elsewhere":
            return self.send_error(404)
        if body["model"] == "strict":
            return self.send_error(400)
        if body["model"] == "busy" and _Door.refusals:
            return self.send_error(_Door.refusals.pop())
        if body["model"] == "broken":
            return self.send_error(502)
        _Door.rows_asked.append(len(body.get("input_ids", [])))
        if self.path == "/v1/tokenize" and body["model"] == "boundless":
            return self.send_error(502)
        if self.path != "/v1/logprobs":  # a token a word; whoever speaks is one too
            words = [word for m in body["messages"] for word in [m["role"], *m["content"].split()]]
            words += [] if body.get("continue_final_message") else ["assistant"]
            ids = [len(word) for word in words]
            if body["messages"][-1]["content"] == "Go on.":  # what was answered before has an end
                ids[-4:-4] = {"padded": [1, END], "open": [1]}.get(body["model"], [END])
            chat = {"choices": [{"prompt_token_ids": ids}]}
            answer = {"tokens": ids} if self.path == "/v1/tokenize" else chat
        else:
            pairs = zip(body["input_ids"], body["start"], strict=True)
            answer = {"data": [{"token_logprobs": [-t / 10 for t in ids[start:]]} for ids, start in pairs]}
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        return None

    def do_GET(self) -> None:
        ends = {} if self.path.endswith("silent") else {"end_token_ids": [END, END + 1]}
        data = json.dumps({"id": "m", **ends}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def url():
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Door)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def _reference(path, *rows):
    lines = [
        {"input_ids": ids, "loss_mask": mask, "dtype": "float32", "base": [0] * len(ids), "trained": [0] * len(ids)}
        for ids, mask in rows
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_reference_rows_are_scored_where_they_carry_loss(url, tmp_path) -> None:
    data = _reference(tmp_path / "reference.jsonl", ([9, 1, 2, 3], [0, 0, 1, 1]), ([1, 10, 50, 20], [0, 1, 0, 1]))
    result = measure_nll(Target(url, "", ("m",)), data, tmp_path / "out", role="tuned")
    assert (result.rows, result.tokens, result.role) == (2, 4, "tuned")
    assert result.nll == pytest.approx((0.2 + 0.3 + 1 + 2) / 4)
    lines = [json.loads(line) for line in (tmp_path / "out" / result.items_file).read_text().splitlines()]
    assert [line["nll"] for line in lines] == pytest.approx([0.25, 1.5])


@pytest.mark.parametrize("model", ["m", "boundless"])  # the second's server cannot answer /v1/tokenize
def test_of_a_chat_the_answer_is_scored(url, tmp_path, model: str) -> None:
    file = tmp_path / "chat.jsonl"
    chat = [{"role": "user", "content": "how many"}, {"role": "assistant", "content": "a dozen or so"}]
    file.write_text(json.dumps({"messages": chat}) + "\n")
    result = measure_nll(Target(url, "", (model,)), str(file), tmp_path)
    assert (result.tokens, result.stderr) == (5, 0)
    assert result.nll == pytest.approx((0.1 + 0.5 + 0.2 + 0.2 + END / 10) / 5)


@pytest.mark.parametrize(("model", "end"), [("padded", [1, END]), ("silent", []), ("open", [])])
def test_the_end_of_turn_counts_where_the_server_tells_it(url, tmp_path, capsys, model: str, end: list[int]) -> None:
    file = tmp_path / "chat.jsonl"
    chat = [{"role": "user", "content": "how many"}, {"role": "assistant", "content": "a dozen or so"}]
    file.write_text(json.dumps({"messages": chat}) + "\n")
    result = measure_nll(Target(url, "", (model,)), str(file), tmp_path)
    scored = [1, 5, 2, 2, *end]
    assert result.tokens == len(scored)
    assert result.nll == pytest.approx(sum(scored) / 10 / len(scored))
    said = "1 of 1 answers are scored without their end of turn" in capsys.readouterr().err
    assert said is not bool(end)


def test_a_busy_server_is_asked_again(url, tmp_path) -> None:
    data = _reference(tmp_path / "reference.jsonl", ([9, 1], [0, 1]))
    _Door.refusals[:] = [503, 429]
    assert measure_nll(Target(url, "", ("busy",)), data, tmp_path).nll == pytest.approx(0.1)
    _Door.refusals[:] = [503] * 3
    with pytest.raises(EndpointError, match="answered 503"):
        measure_nll(Target(url, "", ("busy",)), data, tmp_path)


def test_no_request_asks_for_more_than_the_door_takes(url, tmp_path) -> None:
    _Door.rows_asked.clear()
    long, short = ([1] * 20_000, [0, *[1] * 19_999]), ([1] * 10, [0, *[1] * 9])
    huge = ([1] * 40_000, [0, *[1] * 39_999])  # the door's to judge
    data = _reference(tmp_path / "reference.jsonl", long, long, huge, *[short] * 18)
    result = measure_nll(Target(url, "", ("m",)), data, tmp_path / "out")
    assert _Door.rows_asked == [1, 1, 1, 16, 2]
    assert (result.rows, result.nll) == (21, pytest.approx(0.1))


def test_the_standard_error_takes_rows_as_clusters() -> None:
    once = [Scored(1, 1.0), Scored(1, 3.0)]
    assert clustered_mean(once) == pytest.approx((2.0, 1.0))
    tenfold = [Scored(10, 10.0), Scored(10, 30.0)]  # ten equal tokens a row tell no more than one
    assert clustered_mean(tenfold) == pytest.approx((2.0, 1.0))
    assert clustered_mean([Scored(2, 4.0)]) == (2.0, 0.0)
    assert math.isfinite(clustered_mean([Scored(1, 0.0), Scored(3, 9.0)])[1])


def test_a_table_is_refused_by_name(url, tmp_path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1\xff\x00")
    with pytest.raises(DataError, match=r"rows\.parquet: a bench reads JSONL"):
        measure_nll(Target(url, "", ("m",)), str(tmp_path / "rows.parquet"), tmp_path)


def test_what_cannot_be_measured(url, tmp_path) -> None:
    data = _reference(tmp_path / "reference.jsonl", ([9, 1], [1, 0]))
    with pytest.raises(DataError, match="no token with loss"):
        measure_nll(Target(url, "", ("m",)), data, tmp_path)
    data = _reference(tmp_path / "reference.jsonl", ([9, 1], [0, 1]))
    with pytest.raises(CannotScore, match="has no /v1/logprobs"):
        measure_nll(Target(url, "", ("elsewhere",)), data, tmp_path)
    with pytest.raises(CannotScore, match=r"refused /v1/logprobs \(400\)"):
        measure_nll(Target(url, "", ("strict",)), data, tmp_path)
    with pytest.raises(EndpointError, match="answered 502") as failed:
        measure_nll(Target(url, "", ("broken",)), data, tmp_path)
    assert not isinstance(failed.value, CannotScore)  # it should have been able to: nobody goes on without the figure
    with pytest.raises(EndpointError, match="does not answer"):
        measure_nll(Target("http://127.0.0.1:9", "", ("m",)), data, tmp_path)
