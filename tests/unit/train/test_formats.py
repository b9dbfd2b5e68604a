"""Rows of five formats, with columns of one's own, as one form of conversation."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tuneship.core.errors import DataError
from tuneship.core.recipe import FORMAT_COLUMNS, Data
from tuneship.train.data import formats
from tuneship.train.data.template import Conversation

ASK = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "ho"}
TOOL = {"name": "f", "description": "does", "parameters": {"type": "object", "properties": {}}}
WRAPPED = {"type": "function", "function": TOOL}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def read(row, **data) -> Conversation:
    return formats.conversation(row, Data(train="unused", **data))


def system(text: str) -> dict:
    return {"role": "system", "content": text}


@pytest.mark.parametrize(
    ("format_", "row", "messages"),
    [
        ("messages", {"messages": [ASK, ANSWER]}, [ASK, ANSWER]),
        ("messages", {"messages": json.dumps([ASK, ANSWER])}, [ASK, ANSWER]),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}], "system": "s"},
            [system("s"), ASK, ANSWER],
        ),
        (
            "sharegpt",
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "user", "value": "hi"},
                    {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                    {"from": "observation", "value": "1"},
                    {"from": "model", "value": "ho"},
                ],
                "system": "",
            },
            [
                system("s"),
                ASK,
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "1"},
                ANSWER,
            ],
        ),
        ("sharegpt", {"conversations": [ASK, ANSWER]}, [ASK, ANSWER]),
        ("alpaca", {"instruction": "hi", "output": "ho"}, [ASK, ANSWER]),
        ("alpaca", {"instruction": "hi", "response": "ho", "input": ""}, [ASK, ANSWER]),
        (
            "alpaca",
            {"instruction": "a", "input": "b", "output": "ho", "system": "s", "history": [["hi", "ho"]]},
            [system("s"), ASK, ANSWER, {"role": "user", "content": "a\nb"}, ANSWER],
        ),
        ("prompt-completion", {"prompt": "hi", "completion": "ho"}, [ASK, ANSWER]),
        ("prompt-completion", {"prompt": [system("s"), ASK], "completion": [ANSWER]}, [system("s"), ASK, ANSWER]),
    ],
)
def test_every_format_by_itself_and_by_name(format_, row, messages):
    assert read(row) == read(row, format=format_) == Conversation(messages)
    for other in {"messages", "sharegpt", "alpaca", "prompt-completion", "text"} - {format_}:
        with pytest.raises(DataError, match="has the keys"):
            read(row, format=other)


def test_plain_text():
    assert read({"text": "once"}) == read({"text": "once"}, format="text") == Conversation([], text="once")
    for text in ("", " \n", 5):
        with pytest.raises(DataError, match="text has no text"):
            read({"text": text})


def test_the_most_telling_columns_win():
    row = {"text": "t", "instruction": "hi", "output": "ho"}
    assert read(row).messages == [ASK, ANSWER]
    assert read(row, format="text").text == "t"
    assert read({**row, "messages": None}).messages == [ASK, ANSWER]


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        ({"instruction": "question", "output": "answer"}, {"question": "hi", "answer": "ho"}),
        ({"prompt": "instruction", "completion": "response"}, {"instruction": "hi", "response": "ho"}),
        ({"prompt": "completion", "completion": "prompt"}, {"completion": "hi", "prompt": "ho"}),
        ({"messages": "chat"}, {"chat": [ASK, ANSWER], "conversations": 1}),
        ({"input": "context"}, {"instruction": "hi", "context": None, "response": "ho"}),
        ({"tools": "functions"}, {"functions": None, "prompt": "hi", "completion": "ho"}),
    ],
)
def test_columns_of_ones_own(columns, row):
    assert read(row, columns=columns) == Conversation([ASK, ANSWER])


def test_a_column_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(
        DataError, match=r"no column 'question' \(data.columns.instruction\); its columns are answer, a"
    ):
        read({"answer": "ho", "a": 1}, columns={"instruction": "question", "output": "answer"})


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ({"columns": {"question": "q"}}, "columns names question, which no one format has"),
        ({"columns": {"prompt": "p", "output": "o"}}, "columns names prompt, output, which no one"),
        ({"columns": {"prompt": "p"}, "format": "alpaca"}, r"no one format has \(alpaca: instruction, input"),
    ],
)
def test_columns_of_no_format_are_refused_in_the_recipe(data, complaint):
    with pytest.raises(ValidationError, match=complaint):
        Data(train="t", **data)


@pytest.mark.parametrize("tools", [[TOOL], [WRAPPED], json.dumps([TOOL]), json.dumps([WRAPPED])])
def test_tools_in_every_form(tools):
    for row in ({"messages": [ASK, ANSWER]}, {"prompt": "hi", "completion": "ho"}, {"conversations": [ASK, ANSWER]}):
        assert read({**row, "tools": tools}) == Conversation([ASK, ANSWER], [WRAPPED])


@pytest.mark.parametrize("tools", [None, "", [], "[]"])
def test_no_tools_are_none(tools):
    assert read({"messages": [ASK, ANSWER], "tools": tools}).tools is None


@pytest.mark.parametrize(
    ("call", "wanted"),
    [
        ({"function": {"name": "f", "arguments": '{"x": 1}'}}, CALL),
        ({"name": "f", "arguments": {"x": 1}}, CALL),
        ({"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}, {"id": "1", **CALL}),
        ({"function": {"name": "f"}}, {"type": "function", "function": {"name": "f", "arguments": {}}}),
    ],
)
def test_calls_have_arguments_that_are_objects(call, wanted):
    """Templates write them as JSON: a text would be written in quotes."""
    called = {"role": "assistant", "content": None, "tool_calls": [call]}
    messages = read({"messages": [ASK, called, {"role": "tool", "content": ""}, ANSWER]}).messages
    assert messages[1] == {"role": "assistant", "content": "", "tool_calls": [wanted]}


def test_parts_of_text_are_one_text_and_nulls_are_not_there():
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    asked = {"role": "user", "content": parts, "name": None, "tool_calls": []}
    assert read({"messages": [asked, ANSWER]}).messages == [{"role": "user", "content": "h i"}, ANSWER]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "a row is an object, not list"),
        ({}, "has the keys none; wanted messages, conversations"),
        ({"messages": "hi"}, "messages is neither a list nor JSON"),
        ({"messages": [ASK]}, "the last message is not the assistant's"),
        ({"messages": [{**ASK, "role": "User"}]}, "message 0 has no role out of assistant, system, tool, user"),
        ({"messages": [ASK, {**ANSWER, "content": None}]}, r"message 1 \(assistant\) has no text"),
        ({"messages": [{**ASK, "content": 5}, ANSWER]}, r"message 0 \(user\) is int, not text"),
        (
            {"messages": [{**ASK, "content": [{"type": "image_url"}]}, ANSWER]},
            "message 0 .user. has a part of type 'image_url'",
        ),
        ({"messages": [{**ASK, "tool_calls": [CALL]}, ANSWER]}, "message 0 .user. has tool_calls"),
        ({"messages": [ASK, {**ANSWER, "weight": 0}]}, "message 1 .assistant. says that it is not to be learnt"),
        ({"messages": [ASK, {**ANSWER, "train": False}]}, "not to be learnt"),
        ({"messages": [ASK, {**ANSWER, "tool_calls": [{"function": {}}]}]}, "a call has no name"),
        (
            {"messages": [ASK, {**ANSWER, "tool_calls": [{"name": "f", "arguments": "x"}]}]},
            "the arguments of f is neither a list nor JSON",
        ),
        ({"messages": [ASK, {**ANSWER, "tool_calls": [{"name": "f", "arguments": [1]}]}]}, "of f are no object"),
        ({"messages": [ASK, {**ANSWER, "tool_calls": 5}]}, "tool_calls is not a list of calls"),
        ({"messages": [ASK, ANSWER], "tools": "f"}, "tools is neither a list nor JSON"),
        ({"messages": [ASK, ANSWER], "tools": {"name": "f"}}, "tools is not a list of functions"),
        ({"messages": [ASK, ANSWER], "tools": [{"description": "f"}]}, "tool 0 is no function with a name"),
        ({"conversations": []}, "conversations is not a list of turns"),
        ({"conversations": [5]}, "turn 0 is no object"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "turn 0 is from 'alien', none of human, user, gpt"),
        ({"conversations": [{"from": "function_call", "value": "x"}]}, "turn 0: tool_calls is neither a list nor JSON"),
        (
            {"conversations": [{"from": "system", "value": "x"}, {"from": "gpt", "value": "x"}], "system": "y"},
            "which of them counts is not clear",
        ),
        ({"instruction": "", "output": "x"}, r"message 0 \(user\) has no text"),
        ({"instruction": 5, "output": "x"}, "instruction is int, not text"),
        ({"instruction": "x", "output": 5}, r"message 1 \(assistant\) is int, not text"),
        ({"instruction": "x", "output": "y", "history": [["a"]]}, "history is not a list of .question, answer."),
        ({"instruction": "x", "output": "y", "history": 5}, "history is not a list of .question"),
    ],
)
def test_what_is_no_conversation_is_refused_and_why(row, reason):
    with pytest.raises(DataError, match=reason):
        read(row)


WORDS = ["role", "content", "from", "value", "user", "assistant", "tool_calls", "function", "name", "arguments", "{}"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4),
    max_leaves=12,
)
COLUMNS = sorted({column for columns in FORMAT_COLUMNS.values() for column in columns})


@given(st.dictionaries(st.sampled_from(COLUMNS), JSON, max_size=5))
def test_whatever_a_row_holds_it_is_a_conversation_or_refused(row):
    try:
        found = read(row)
    except DataError:
        return
    assert found.text or found.messages[-1]["role"] == "assistant"
    assert all(isinstance(message["content"], str) for message in found.messages)
