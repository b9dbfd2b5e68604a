"""Prompts: the asked length, what is shared and what is not, files as they are."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneship.bench.load.prompts import make_prompt, source
from tuneship.core.errors import DataError


@given(st.integers(1, 300), st.sampled_from(["", "salt"]))
def test_prompts_have_the_asked_length(words: int, salt: str) -> None:
    assert len(make_prompt(words, "7", salt).split()) == words


@given(st.integers(2, 60), st.integers(1, 59), st.sampled_from(["", "salt"]))
def test_a_shared_prefix_is_shared_and_the_rest_is_not(words: int, prefix: int, salt: str) -> None:
    prefix = min(prefix, words - 1)
    prompts = source("shared-prefix", input_tokens=words, output_tokens=1, prefix_tokens=prefix, salt=salt)
    first, *others = [prompts.make("4", index, words)[0]["content"].split() for index in range(8)]
    assert all(len(other) == words and other[:prefix] == first[:prefix] for other in others)
    assert any(other[prefix:] != first[prefix:] for other in others)


def test_a_shared_prefix_is_new_in_every_run() -> None:
    def head(salt: str) -> str:
        prompts = source("shared-prefix", input_tokens=40, output_tokens=1, prefix_tokens=30, salt=salt)
        return " ".join(prompts.make("4", 0, 40)[0]["content"].split()[:4])

    assert head("x") != head("y")


def test_a_file_is_asked_without_its_answers(tmp_path) -> None:
    rows = [
        {"messages": [{"role": "system", "content": "be short"}, {"role": "user", "content": "one"},
                      {"role": "assistant", "content": "ANSWER"}]},
        {"prompt": "two"},
    ]  # fmt: skip
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    prompts = source("heldout", input_tokens=1, output_tokens=9, heldout=str(file))
    assert not prompts.ignore_eos
    assert prompts.make("4", 0, 1) == rows[0]["messages"][:2]
    assert prompts.make("4", 3, 1) == [{"role": "user", "content": "two"}]
    salted = source(str(file), input_tokens=1, output_tokens=9, salt="x")
    first, again = (salted.make("4", index, 1)[0]["content"] for index in (0, 2))
    assert first.endswith(". be short")
    assert first != again  # a second pass is not answered from the cache of the first


@pytest.mark.parametrize("line", ["{", "[1]", '{"text": "x"}', '{"messages": [{"role": "assistant", "content": "x"}]}'])
def test_a_bad_line_is_named(tmp_path, line: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "fine"}\n\n' + line)
    with pytest.raises(DataError, match=r"rows\.jsonl:3"):
        source(str(file), input_tokens=1, output_tokens=1)


def test_no_file_is_said() -> None:
    with pytest.raises(DataError, match="cannot read"):
        source("gone.jsonl", input_tokens=1, output_tokens=1)
    with pytest.raises(DataError, match="no file"):
        source("heldout", input_tokens=1, output_tokens=1)
