"""What would end the engine for all is refused; what a client may ask for is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneship.serve import bodies, bounds
from tuneship.serve.bounds import Facts
from tuneship.serve.refusals import Refusal

TOKENS = 512
BASE = Facts(TOKENS)


def refusal(asked: dict) -> Refusal:
    with pytest.raises(Refusal) as caught:
        bounds.check(asked, BASE)
    assert caught.value.status == 400
    return caught.value


def schema(value: object) -> dict:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}}


def tool(parameters: object) -> dict:
    return {"tools": [{"type": "function", "function": {"name": "f", "parameters": parameters}}]}


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"prompt": [TOKENS]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [[1], [TOKENS]]}, "prompt"),
        ({"prompt": [[1.0]]}, "prompt"),
        ({"prompt": [["1"]]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [{}]}, "prompt"),
        ({"input_ids": [TOKENS]}, "input_ids"),
        ({"input_ids": [[TOKENS]]}, "input_ids"),
        ({"stop_token_ids": [TOKENS], "min_tokens": 1}, "stop_token_ids"),
        ({"stop_token_ids": ["600"]}, "stop_token_ids"),
        ({"stop_token_ids": 3}, "stop_token_ids"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": "600"}, "top_logprobs"),
        ({"logprobs": 10**9}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"n": 129}, "n"),
        ({"n": "1000000"}, "n"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"n": 1e6}, "n"),
        ({"best_of": 10**6}, "best_of"),
        ({"prompt": ["a"] * 100, "n": 11}, "n"),
        ({"prompt": ["a"] * 1025}, "n"),
        ({"top_k": 2**31}, "top_k"),
        ({"logit_bias": {"1": 1e308}}, "logit_bias"),
        ({"logit_bias": {"1": "1e308"}}, "logit_bias"),
        ({"stop_regex": "(a+)+$"}, "stop_regex"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs"),
        (schema({"$ref": "#"}), "response_format"),
        (schema({"anyOf": [{"type": "null"}, {"$ref": "#"}]}), "response_format"),
        (schema({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}), "response_format"),
        (schema({"properties": {"p": {"allOf": [{"$ref": "#/properties/p"}]}}}), "response_format"),
        (tool({"$ref": "#"}), "tools"),
        ({"response_format": True}, "response_format"),
        ({"response_format": ["json_object"]}, "response_format"),
    ],
    ids=str,
)
def test_what_would_end_the_engine(asked, param):
    assert refusal(asked)._error["param"] == param


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"prompt": "a"},
        {"prompt": ["a", "b"], "n": 128},
        {"prompt": [0, TOKENS - 1]},
        {"prompt": [[1], [2]]},
        {"prompt": []},
        {"input_ids": [[0], [TOKENS - 1]], "start": [0, 0]},
        {"stop_token_ids": [2], "min_tokens": 1},
        {"stop_token_ids": []},
        {"logprobs": True, "top_logprobs": 20},
        {"logprobs": 5},
        {"n": None, "logprobs": None, "prompt": None, "stop_token_ids": None, "logit_bias": None},
        {"logit_bias": {"5": -100, "6": 0.5}},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"chat_template_kwargs": 3},
        {"logit_bias": 3, "tools": 3, "response_format": None},
        schema({"type": "object", "properties": {"next": {"$ref": "#"}}}),
        schema({"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}}}),
        schema({"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}], "$defs": {"a": {"type": "null"}}}),
        schema({"$ref": "#/nowhere"}),
        schema({"$ref": "https://example.org/x"}),
        schema(True),
    ],
    ids=str,
)
def test_what_a_client_may_ask_for(asked):
    bounds.check(asked, BASE)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
KEYS = ["prompt", "input_ids", "stop_token_ids", "n", "logit_bias", "tools", "response_format", "chat_template_kwargs"]


@given(asked=st.dictionaries(st.sampled_from(KEYS), values))
def test_whatever_comes_is_let_through_or_refused(asked):
    try:
        bounds.check(asked, BASE)
    except Refusal as refused:
        json.loads(bytes(refused.response().body))


@pytest.mark.parametrize(
    ("config", "tokens"), [({"vocab_size": 7}, 7), ({"text_config": {"vocab_size": 8}}, 8), ({}, 2**31), (None, 2**31)]
)
def test_the_vocabulary_is_the_checkpoints(tmp_path: Path, config, tokens):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert bounds.facts(tmp_path).tokens == tokens


@pytest.mark.parametrize(
    ("template", "takes"),
    [("{% if tools %}{{ tools }}{% endif %}", True), ("{{ messages }}", False), (None, True)],
    ids=["shown", "not shown", "no template: SGLang knows better"],
)
def test_tools_that_the_template_leaves_out(tmp_path: Path, template, takes):
    if template is not None:
        (tmp_path / "chat_template.jinja").write_text(template)
    found = bounds.facts(tmp_path)
    assert found.takes_tools is takes
    named = {"type": "function", "function": {"name": "f"}}
    for choice in ({}, {"tool_choice": "auto"}, {"tool_choice": "required"}, {"tool_choice": named}):
        asked = {**tool({"type": "object"}), **choice}
        if takes:
            bounds.check(asked, found)
            continue
        with pytest.raises(Refusal) as caught:
            bounds.check(asked, found)
        assert caught.value.code == "tools_not_supported"
    bounds.check({**tool({"type": "object"}), "tool_choice": "none"}, found)
    bounds.check({"tools": []}, found)


def nested(depth: int, opening: str = "[", closing: str = "]") -> bytes:
    return f'{{"a": {opening * depth}1{closing * depth}}}'.encode()


def test_the_longest_numbers():
    assert bodies.parse(b'{"a": [9223372036854775807, -9223372036854775808, "99999999999999999999"]}')


@pytest.mark.parametrize("body", [nested(99), nested(99, '{"a": ', "}"), b'{"a": [' + b"[]," * 500 + b"[]]}"])
def test_depths_that_everybody_reads(body):
    assert bodies.parse(body)


@pytest.mark.parametrize(
    "body",
    [
        *(nested(100), nested(100, '{"a": ', "}"), nested(900), nested(100_000)),
        *(b'{"a": 1e999}', b'{"a": -1e999}', b'{"a": Infinity}', b'{"a": NaN}', b'{"a": ' + b"9" * 5000 + b"}"),
        *(b'{"a": 9223372036854775808}', b'{"a": [-9223372036854775809]}'),
        *(b'{"a": 1} {', b"null", b"\x00"),
    ],
    ids=lambda body: body[:20].decode(),
)
def test_bodies_that_somebody_would_choke_on(body):
    with pytest.raises(Refusal) as caught:
        bodies.parse(body)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


@given(value=values)
def test_what_is_json_is_read_as_it_is(value):
    assert bodies.parse(json.dumps({"a": value}).encode()) == {"a": value}
