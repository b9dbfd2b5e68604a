"""The verbs as the command line runs them: arguments as text, tables to stdout, talk to stderr, files in a folder."""

import json
import sys

import cyclopts
import pytest

from tuneship.bench import commands
from tuneship.bench.compare.commands import compare
from tuneship.core.errors import DataError, EndpointError, TuneshipError
from tuneship.core.report import read_report


@pytest.fixture
def app():
    app = cyclopts.App(result_action="return_value")
    app.command(commands.load, name="load")
    app.command(commands.eval_, name="eval")
    app.command(commands.nll, name="nll")
    app.command(compare, name="compare")
    return lambda line: app(line, exit_on_error=False, print_error=False)


def test_load(app, server, tmp_path, capsys) -> None:
    out = tmp_path / "one"
    app(f"load {server.url} --rates 20 40 --duration-s 1 --arrivals constant --output-tokens 3 --out {out}")
    talk = capsys.readouterr()
    assert "TTFT p50/p99 ms" in talk.out
    assert talk.out.count("\n") == 3  # a header and two levels, no line cut in two
    assert "warming up steady" in talk.err
    assert "report.html" in talk.err
    report = read_report(out / "report.json")
    assert [(level.rate, level.completed, level.arrivals) for level in report.load] == [
        (20, 20, "constant"),
        (40, 40, "constant"),
    ]
    assert report.endpoint == {"url": server.url}
    assert (out / "report.html").stat().st_size > 500_000
    with pytest.raises(TuneshipError, match="already holds a report"):
        app(f"load {server.url} --rates 20 --duration-s 1 --out {out}")


def test_eval(app, server, tmp_path, capsys, monkeypatch) -> None:
    rows = [[{"role": "user", "content": "say ok"}, {"role": "assistant", "content": word}] for word in ("OK", "no")]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    app(f"eval {server.url} --task exact --data words.jsonl")
    assert "0.500" in capsys.readouterr().out
    (folder,) = tmp_path.glob("bench-*")
    result = read_report(folder / "report.json").eval[0]
    assert (result.task, result.score, result.role, result.items) == ("exact", 0.5, "other", 2)
    assert (folder / result.items_file).is_file()
    assert "say ok" in (folder / "report.html").read_text()


def _rows(folder, *pairs, **extra) -> None:
    rows = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"messages": row, **extra}) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("options", "reply", "score"),
    [
        ("--task regex --pattern total=([0-9]+)", "so total=7.", 1),
        ("--task regex --pattern total=([0-9]+).*!", "so total=7.", 0),
        ("--task numeric", "7.4", 0),
        ("--task numeric --tolerance 0.5", "7.4", 1),
        ("--task numeric --tolerance 0.3", "7.4", 0),
        ("--task json-schema --schema whole.json", "8", 1),
        ("--task json-schema --schema whole.json", "8.5", 0),
        ("--task python:mine.py:first_letter", "told", 0.5),
    ],
)
def test_options_of_scorers(app, server, behaviour, tmp_path, monkeypatch, options: str, reply: str, score) -> None:
    server.behaviours["m"] = behaviour(reply=lambda _: reply)
    _rows(tmp_path, ("how many?", "7" if "json" in options else "total=7 !"))
    (tmp_path / "whole.json").write_text('{"type": "integer"}')
    (tmp_path / "mine.py").write_text(
        "def first_letter(answer, reference, row):\n"
        "    return 1.0 if answer == reference else 0.5 if answer[0] == reference[0] else 0.0\n"
    )
    monkeypatch.chdir(tmp_path)  # paths on the command line are relative to where one stands
    app(f"eval {server.url} --model m {options} --data rows.jsonl --out out")
    (result,) = read_report(tmp_path / "out/report.json").eval
    assert result.score == score


def test_several_samples(app, server, behaviour, tmp_path) -> None:
    server.behaviours["m"] = behaviour(reply=lambda body: "yes" if body["seed"] % 2 else "no")
    _rows(tmp_path, ("?", "yes"), ("!", "yes"))
    asked = f"eval {server.url} --model m --task exact --data {tmp_path}/rows.jsonl --samples 3 --seed 5"
    with pytest.raises(TuneshipError, match="temperature 0"):
        app(f"{asked} --out {tmp_path}/out")
    app(f"{asked} --temperature 0.7 --out {tmp_path}/out")
    (result,) = read_report(tmp_path / "out/report.json").eval
    assert (result.items, result.samples, result.score) == (2, 3, pytest.approx(2 / 3))
    assert result.extra == {"pass@3": 1.0}
    assert sorted((body["seed"], body["temperature"]) for body in server.bodies) == [
        (seed, 0.7) for seed in (5, 5, 6, 6, 7, 7)
    ]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--task json-schema --schema gone.json", "gone.json"),
        ("--task json-schema", "have a 'schema'"),
        ("--task regex --pattern (", "pattern"),
        ("--task python:gone.py:f", "no such Python file"),
    ],
)
def test_options_that_cannot_score(app, server, tmp_path, options: str, says: str) -> None:
    _rows(tmp_path, ("?", "yes"))
    with pytest.raises(TuneshipError, match=says):
        app(f"eval {server.url} {options} --data {tmp_path}/rows.jsonl --out {tmp_path}/out")
    assert server.bodies == []  # before anything is asked
    assert not (tmp_path / "out").exists()


def test_nll(app, server, behaviour, tmp_path, capsys) -> None:
    server.behaviours["sure"] = behaviour(nats=0.25)
    row = {"input_ids": [4, 5, 6], "loss_mask": [0, 1, 1], "dtype": "float32", "base": [0] * 3, "trained": [0] * 3}
    (tmp_path / "reference.jsonl").write_text(json.dumps(row) + "\n")
    asked = f"nll {server.url} --data {tmp_path}/reference.jsonl --out {tmp_path}/out"
    app(f"{asked} --model sure")
    assert "reference.jsonl  sure" in (table := capsys.readouterr().out)
    assert "0.2500" in table
    assert "1.284" in table  # e to that
    (result,) = read_report(tmp_path / "out/report.json").nll
    assert (result.model, result.rows, result.tokens, result.nll) == ("sure", 1, 2, 0.25)
    assert json.loads((tmp_path / "out" / result.items_file).read_text()) == {"index": 0, "tokens": 2, "nll": 0.25}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *(result.items_file, "report.html", "report.json"),
    ]
    with pytest.raises(TuneshipError, match="already holds a report"):
        app(f"{asked} --model sure")


def test_nll_of_a_server_that_cannot_score_text(app, server, tmp_path) -> None:
    row = {"input_ids": [4, 5], "loss_mask": [0, 1], "dtype": "float32", "base": [0, 0], "trained": [0, 0]}
    (tmp_path / "reference.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(EndpointError, match="cannot score text") as caught:
        app(f"nll {server.url} --data {tmp_path}/reference.jsonl --out {tmp_path}/out")
    assert "tuneship serve" in caught.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "line",
    [
        "load URL --rates 0",
        "load URL --rates fast",
        "load URL --duration-s -1",
        "load URL --arrivals trace",
        "eval URL --data x.jsonl",
        "eval URL --task exact --data x --limit 0",
    ],
)
def test_usage(app, line: str) -> None:
    with pytest.raises(cyclopts.CycloptsError):
        app(line)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--task exact", "--task exact needs --data"),
        ("--task lm-eval:gsm8k --data x.jsonl", "--task lm-eval:gsm8k takes no --data"),
    ],
)
def test_data_are_given_where_the_task_has_none(app, tmp_path, monkeypatch, line: str, says: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=says):
        app(f"eval http://127.0.0.1:9 {line}")
    assert list(tmp_path.iterdir()) == []


def test_a_bench_that_fails_leaves_no_folder(app, server, behaviour, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    server.behaviours["broken"] = behaviour(fault="http_500")
    with pytest.raises(EndpointError, match="warm-up"):
        app(f"load {server.url} --model broken")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_what_could_not_start(app, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EndpointError, match="does not answer"):
        app("load http://127.0.0.1:9")
    assert list(tmp_path.iterdir()) == []


def test_load_of_every_kind(app, server, behaviour, tmp_path, capsys) -> None:
    server.behaviours["other"] = behaviour()
    (tmp_path / "rows.jsonl").write_text('{"prompt": "hi"}\n')
    (tmp_path / "trace.jsonl").write_text("".join(json.dumps({"timestamp": 100 * n}) + "\n" for n in range(9)))
    app(
        f"load {server.url} --model steady,other --trace {tmp_path}/trace.jsonl --concurrency 2 --duration-s 1 "
        f"--warm-up-s 0.25 --workload {tmp_path}/rows.jsonl --adapters steady=1,other=3 --slo-ttft-ms 60000 "
        f"--output-tokens 3 --out {tmp_path}/out"
    )
    trace, closed = read_report(tmp_path / "out/report.json").load
    assert (trace.arrivals, trace.requests, trace.goodput) == ("trace", 6, 1)  # three were the warm-up
    # The times are those of the file, whatever the mean rate: none leaves earlier (on a busy machine some leave later).
    assert all(sent > n / 10 - 0.01 for n, (sent, *_) in zip(range(3, 9), trace.timeline, strict=True))
    assert (closed.arrivals, closed.concurrency, closed.rate) == ("closed", 2, 0)
    assert closed.window_s == (0.25, 1.25)
    assert "2 in flight" in capsys.readouterr().out


@pytest.mark.parametrize("more", ["--rates 1 sweep", "--adapters steady", "--adapters other=1"])
def test_a_load_that_makes_no_sense(app, server, tmp_path, more: str) -> None:
    with pytest.raises(TuneshipError):
        app(f"load {server.url} {more} --out {tmp_path}/out")


def test_what_was_measured_is_on_disk_although_the_page_cannot_be_drawn(server, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)  # as where the library is not installed
    monkeypatch.delitem(sys.modules, "tuneship.bench.report.page", raising=False)
    with pytest.raises(ModuleNotFoundError):
        commands.load(server.url, rates=(4,), duration_s=1, output_tokens=2, out=tmp_path / "out")
    assert read_report(tmp_path / "out" / "report.json").load[0].completed > 0
    assert not (tmp_path / "out" / "report.html").exists()
