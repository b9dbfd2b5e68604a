"""What is to be run where it cannot be told: all that was measured, as much more of it as it takes, and how long."""

import json
import shlex

import cyclopts
import pytest

from tuneship.bench.compare import servers
from tuneship.bench.compare.again import Again, Pace, decide
from tuneship.bench.compare.commands import compare
from tuneship.bench.compare.live import Pair
from tuneship.core.errors import ExitCode
from tuneship.core.report import read_report

AGAIN = Again("tuneship bench compare a b --task exact", limit=200, pairs=12, asks=True)


@pytest.fixture
def ask(server, behaviour, make_level, monkeypatch, tmp_path, capsys):
    """Compare two models that are alike, as the command line does, with these words; what it prints to decide.

    What they are asked is answered; the blocks of load are made, so that no busy machine has a say.
    """
    slower = [1.0, 1.01, 0.99]
    monkeypatch.setattr(
        servers, "measure",
        lambda _a, _b, plan, *_: [Pair(make_level(), make_level(slower=slower[i % 3])) for i in range(plan.pairs)],
    )  # fmt: skip
    for name in ("one", "two"):
        server.behaviours[name] = behaviour(0.01, 0.001, nats=0.3, reply=lambda body: body["messages"][-1]["content"])
    rows = [[{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"say {i}"}] for i in range(40)]
    (tmp_path / "my rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    app = cyclopts.App(result_action="return_value")
    app.command(compare, name="compare")

    def run(*words: str) -> list[str]:
        command = ["compare", server.url, server.url, "--model", "one", "--candidate-model", "two", *words]
        with pytest.raises(SystemExit) as ended:
            app(command, exit_on_error=False, print_error=False)
        assert ended.value.code == ExitCode.CANNOT_TELL
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("to decide")]

    return run


LOAD = ("--pairs", "2", "--rate", "20", "--duration-s", "0.3", "--output-tokens", "4")


def test_it_repeats_all_that_was_measured(ask, tmp_path) -> None:
    data = str(tmp_path / "my rows.jsonl")
    asked = ("--task", "exact", "--data", data, "--max-tokens", "9", "--limit", "30")
    judged = ("--latency-margin", "0.1", "--alpha", "0.01")
    (line,) = ask(*LOAD, *asked, *judged, "--out", str(tmp_path / "out"))
    said, _, command = line.partition(": ")
    assert said.startswith("to decide, in about ")
    words = shlex.split(command)
    assert words[:3] == ["tuneship", "bench", "compare"]
    options = dict(zip(words[5::2], words[6::2], strict=True))
    given = [*LOAD, *asked, *judged]
    same = {name: value for name, value in zip(given[::2], given[1::2], strict=True) if options[name] == value}
    assert set(given[::2]) - same.keys() == {"--pairs", "--limit"}
    assert (options["--model"], options["--candidate-model"]) == ("one", "two")
    assert int(options["--pairs"]) > 2
    assert int(options["--limit"]) > 30, "30 items cannot tell of 0.02 points"
    rows = read_report(tmp_path / "out" / "report.json").comparison
    assert {row.next_step.rpartition(" --limit ")[0] for row in rows} == {command.rpartition(" --limit ")[0]}


def test_more_rows_than_there_are_are_not_asked_for(ask, tmp_path) -> None:
    data = str(tmp_path / "my rows.jsonl")
    (line,) = ask(*LOAD, "--task", "exact", "--data", data, "--out", str(tmp_path / "out"))
    assert "--limit 200" in line
    task = read_report(tmp_path / "out" / "report.json").comparison[-1]
    assert task.next_step.startswith("about ")
    assert task.next_step.endswith("items, and my rows.jsonl has 40: add to it")


def test_a_load_alone_needs_no_rows(ask) -> None:
    (line,) = ask(*LOAD)
    assert "--limit" not in line
    assert "--data" not in line


def test_one_command_does_as_much_as_each() -> None:
    other = Again("tuneship bench compare a c", 200, 4, asks=False)
    steps = [AGAIN.of_pairs(30), AGAIN.of_items(450), other.of_pairs(5), other.of_pairs(9), "about 90 items", ""]
    assert decide(steps) == [
        "tuneship bench compare a b --task exact --limit 450 --pairs 30",
        "tuneship bench compare a c --pairs 9",
    ]


@pytest.mark.parametrize(
    ("pace", "says"),
    [(Pace(0.01), "about 1 s"), (Pace(2), "about 24 s"), (Pace(5, 0.4), "about 4 min"), (Pace(900), "about 3 h")],
)
def test_how_long_it_will_take(pace: Pace, says: str) -> None:
    assert pace.of(AGAIN.of_items(450)) == says
