"""Rows are used whole or refused by file and line."""

from __future__ import annotations

import json

import pytest

from tuneship.core.errors import DataError
from tuneship.core.recipe import Data
from tuneship.train.data import dataset
from tuneship.train.data.template import ChatTemplate

GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}


@pytest.fixture
def template(tokenizer):
    return ChatTemplate(tokenizer)


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def settings(**changes) -> Data:
    return Data(train="unused", **changes)


def test_rows_of_both_formats_become_the_same_tokens(tmp_path, template):
    messages = dataset.load(write(tmp_path / "a.jsonl", GOOD), settings(), template)
    pairs = dataset.load(write(tmp_path / "b.jsonl", {"prompt": "hi", "completion": "ho"}), settings(), template)
    assert list(messages.rows) == list(pairs.rows)
    assert messages.loss_tokens == pairs.rows[0].loss_tokens > 1
    assert messages.sha256 != pairs.sha256


def test_a_glob_reads_all_files_in_order(tmp_path, template):
    write(tmp_path / "1.jsonl", GOOD)
    write(tmp_path / "2.jsonl", GOOD, "", GOOD)
    assert len(dataset.load(str(tmp_path / "*.jsonl"), settings(), template).rows) == 3


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", "a row is an object, not list"),
        ({"answer": "x"}, "has the keys answer; wanted messages, conversations, instruction with output or response, "),
        ({"messages": []}, "not a list of messages"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "message 0 has no role"),
        ({"messages": [{"role": "user", "content": "x"}]}, "the last message is not the assistant's"),
        (
            {"messages": [GOOD["messages"][0], {"role": "assistant", "content": "  "}]},
            "message 1 .assistant. has no text",
        ),
        ({"prompt": "x", "completion": "y " * 400}, "tokens, over data.max_length = 64"),
    ],
)
def test_a_bad_row_is_refused_by_file_and_line_and_why(tmp_path, template, row, reason):
    path = write(tmp_path / "rows.jsonl", GOOD, row)
    with pytest.raises(DataError, match=rf"1 of 2 rows cannot be used:\nrows.jsonl:2: .*{reason}"):
        dataset.load(path, settings(max_length=64), template)


def test_skipping_bad_rows_says_how_many(tmp_path, template, capsys):
    path = write(tmp_path / "rows.jsonl", GOOD, "{", "{")
    loaded = dataset.load(path, settings(on_bad_row="skip"), template)
    assert len(loaded.rows) == 1
    assert "skipped 2 of 3 rows, the first: rows.jsonl:2" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_refused(tmp_path, template, content):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"rows.jsonl holds no usable row"):
        dataset.load(str(path), settings(), template)


def test_only_bad_rows_are_not_an_empty_success(tmp_path, template):
    with pytest.raises(DataError, match="holds no usable row"):
        dataset.load(write(tmp_path / "rows.jsonl", "{"), settings(on_bad_row="skip"), template)


def test_a_missing_file_is_refused(tmp_path, template):
    with pytest.raises(DataError, match="no data file"):
        dataset.load(str(tmp_path / "nope.jsonl"), settings(), template)


def test_conversations_are_written_out_for_whoever_reads_messages_alone(tmp_path, template):
    rows = [{"prompt": "h\u00f6", "completion": "ho"}, {"text": "plain"}, {"instruction": "hi", "output": "ho"}]
    loaded = dataset.load(write(tmp_path / "rows.jsonl", *rows), settings(), template)
    assert dataset.write_conversations(loaded.rows, tmp_path / "out.jsonl") == 2
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["messages"][0]["content"] for row in written] == ["h\u00f6", "hi"]
