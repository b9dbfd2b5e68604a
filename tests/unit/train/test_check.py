"""`data check` counts what is there, no more and no less, and says where."""

from __future__ import annotations

import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.train import families
from tuneship.core.errors import DataError
from tuneship.core.recipe import Data
from tuneship.train.data import check as module
from tuneship.train.data.check import Report
from tuneship.train.data.seen import Seen
from tuneship.train.data.template import ChatTemplate, Conversation, end_token_ids


def row(question: str, answer: str = "yes", **more) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


@pytest.fixture
def check(tmp_path, tokenizer):
    """(train rows, held-out rows, template, settings) -> the report."""

    def look(train, heldout=None, template=None, **keys) -> Report:
        def write(name, rows):
            path = tmp_path / name
            path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in rows))
            return str(path)

        held = write("heldout.jsonl", heldout) if heldout else ""
        used = template or ChatTemplate(tokenizer)
        data = Data(train=write("train.jsonl", train), heldout=held, **keys)
        return module.check(data, used, end_token_ids(used, []))

    return look


def test_every_refused_row_is_counted_under_its_reason(check):
    found = check([row("a"), "{", "{}", row("b", " "), row("c"), '{"messages": [1', '{"x": 1}']).train
    assert (found.rows, found.usable, found.unusable) == (7, 2, 5)
    by_reason = {reason.partition(";")[0]: finding.first for reason, finding in found.refused.items()}
    assert list(by_reason) == ["not JSON", "has the keys ...", "message N (assistant) has no text"]
    assert [place.partition(": ")[0] for place in by_reason["not JSON"]] == ["train.jsonl:2", "train.jsonl:6"]
    assert by_reason["has the keys ..."][1].startswith("train.jsonl:7: has the keys x; wanted ")
    assert by_reason["message N (assistant) has no text"] == ["train.jsonl:4: message 1 (assistant) has no text"]


def test_a_reason_is_not_repeated_and_comes_with_what_to_do(check):
    tools = [{"type": "function", "function": {"name": "f"}}]
    (finding,) = check([row("a"), row("b", tools=tools)]).train.refused.values()
    assert finding.first == ["train.jsonl:2"]
    assert "system message" in finding.hint


def test_reasons_that_differ_in_numbers_are_one_and_the_first_few_are_named(check):
    bad = [{"messages": [*row("a")["messages"]] * count + [{"role": "user"}]} for count in range(1, 9)]
    (reason,) = (found := check([row("a"), *bad]).train).refused
    assert reason == "message N (user) has no text"
    assert found.refused[reason].rows == 8
    assert found.refused[reason].first[:2] == [
        "train.jsonl:2: message 2 (user) has no text",
        "train.jsonl:3: message 4 (user) has no text",
    ]
    assert len(found.refused[reason].first) == 5


def test_reasons_without_end_are_counted_together_at_last(check, tokenizer):
    picky = "{% if 'bad' in messages[0].content %}{{ raise_exception(messages[0].content) }}{% endif %}"
    template = ChatTemplate(tokenizer, picky + tokenizer.chat_template)
    found = check([row("a"), *(row(f"bad {'x' * count}") for count in range(40))], template=template).train
    assert len(found.refused) == 31
    assert found.refused["other reasons"].rows == 10


def test_tokens_and_their_share_are_of_the_rows_that_are_used(check, tokenizer):
    template = ChatTemplate(tokenizer)
    rows = [row("a", "b"), row("a b c", "d e")]
    encoded = [template.encode(Conversation(one["messages"])) for one in rows]
    found = check([*rows, row("x " * 90), "{"], max_length=64).train
    assert found.usable == 2
    assert found.tokens == sum(len(one.input_ids) for one in encoded)
    assert found.loss_tokens == sum(one.loss_tokens for one in encoded)


def test_what_is_too_long_and_what_of_it_would_be_cut(check, tokenizer):
    template = ChatTemplate(tokenizer)

    def length(question, answer):
        return len(template.encode(Conversation(row(question, answer)["messages"])).input_ids)

    limit = length("q", "word " * 20 + "end") - 1  # what is over it is the line break after the end of turn
    assert length("qz", "word " * 20 + "end") == limit + 2  # its end of turn is the first token over the limit
    rows = [
        row("q", "word " * 20 + "end"),
        row("qz", "word " * 20 + "end"),
        row("q", "word " * 30),
        row("word " * 40, "a"),
        row("q", "a"),
    ]
    found = check(rows, max_length=limit).train
    assert (found.usable, found.too_long.rows, found.cut.rows, found.lost) == (1, 4, 3, 1)
    assert found.too_long.first[0] == f"train.jsonl:1: {limit + 1} tokens"
    assert [place.partition(": ")[0] for place in found.cut.first] == [f"train.jsonl:{line}" for line in (2, 3, 4)]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=120))
def test_the_max_length_that_is_named_leaves_that_share_whole(lengths):
    needed = module.needed(lengths)
    for name, share in (("95%", 0.95), ("99%", 0.99), ("100%", 1.0)):
        held = [sum(length <= limit for length in lengths) / len(lengths) for limit in (needed[name], needed[name] - 1)]
        assert held[0] >= share > held[1]


def test_the_same_conversation_twice_is_named_with_the_first(check):
    again = row(" a ", "yes", id=7)
    found = check([row("a"), row("b"), again, row("a", "no"), row("a")]).train.duplicates
    assert found.rows == 2
    assert found.first == ["train.jsonl:3 is train.jsonl:1", "train.jsonl:5 is train.jsonl:1"]


def test_tools_and_system_messages_tell_conversations_apart(check, tokenizer):
    plain = row("a")
    with_system = {"messages": [{"role": "system", "content": "s"}, *plain["messages"]]}
    assert check([plain, with_system]).train.duplicates.rows == 0


def test_train_rows_in_heldout_by_prompt_and_by_conversation_apart(check):
    found = check([row("a"), row("b"), row("c", "no"), row("d")], [row("x"), row("c"), row("b"), row("y")])
    assert (found.same_conversation.rows, found.same_prompt.rows) == (1, 1)
    assert found.same_conversation.first == ["train.jsonl:2 is heldout.jsonl:3"]
    assert found.same_prompt.first == ["train.jsonl:3 is heldout.jsonl:2"]
    assert found.heldout.rows == 4


def test_a_text_has_no_prompt_that_could_stand_in_heldout(check):
    found = check([{"text": "a"}, {"text": "b"}], [{"text": "b"}, {"text": "c"}])
    assert (found.same_conversation.first, found.same_prompt.rows) == (["train.jsonl:2 is heldout.jsonl:1"], 0)


@pytest.mark.parametrize("loss", ["assistant", "all"])
def test_an_end_that_is_not_learnt_is_seen(check, tokenizer, loss):
    text = (
        "{% for m in messages %}<|im_start|>{{ m.content }}"
        "{% if 'open' in m.content %}<|endoftext|>{% else %}<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    found = check([row("a"), row("b", "open"), row("open")], template=ChatTemplate(tokenizer, text), loss=loss).train
    assert found.without_end.rows == 1
    assert found.without_end.first[0].startswith("train.jsonl:2: ends with ")


def test_the_line_break_behind_an_end_is_no_missing_end(check):
    assert check([row("a")], loss="all").train.without_end.rows == 0


def test_a_second_bos_is_seen_where_bos_begins_texts(check):
    template = families.llama3().template
    bos = "<|begin_of_text|>"
    found = check([row("a"), row(f"{bos}b"), {"text": "c"}, {"text": f"{bos}{bos}d"}], template=template).train
    assert found.double_bos.rows == 2
    assert found.double_bos.first[0].startswith("train.jsonl:2: has one more as its token ")
    assert found.double_bos.first[1] == "train.jsonl:4: begins with two"


def test_a_bos_that_begins_every_turn_is_not_doubled(check):
    assert check([row("a")], template=families.smollm2().template).train.double_bos.rows == 0


def test_a_bos_that_is_the_end_token_too_is_not_doubled(check, tokenizer):
    tokenizer.bos_token = tokenizer.eos_token
    assert check([{"text": "a"}], template=ChatTemplate(tokenizer)).train.double_bos.rows == 0


def test_a_special_token_written_in_a_message_is_seen(check):
    found = check([row("a"), row("b", "say <|im_end|> now"), {"text": "<|im_start|>"}]).train.special_text
    assert found.first == ["train.jsonl:2: message 1 (assistant) has <|im_end|>"]


def test_a_template_that_knows_the_day_is_noted(check, tokenizer):
    text = "{{ strftime_now('%d') }}" + tokenizer.chat_template
    (note,) = check([row("a")], template=ChatTemplate(tokenizer, text)).notes
    assert "day's date" in note


def test_no_rows_at_all_is_an_error(check):
    with pytest.raises(DataError, match="holds no row"):
        check(["", " "])


words = st.lists(st.sampled_from("abcd"), max_size=20)


@given(words, words)
def test_seen_is_what_comparing_texts_says(train, heldout):
    def seen(texts, name):
        kept = Seen()
        for index, text in enumerate(texts, start=1):
            kept.add(Conversation(row(text)["messages"]), f"{name}:{index}")
        return kept

    ours, theirs = seen(train, "t"), seen(heldout, "h:x")
    assert ours.twice() == [i for i, text in enumerate(train) if text in train[:i]]
    standing = ours.standing_in(theirs, "prompt")
    assert standing == [i for i, text in enumerate(train) if text in heldout]
    for index, pair in zip(standing, ours.pairs(standing, theirs, "prompt"), strict=True):
        assert str(pair) == f"t:{index + 1} is h:x:{heldout.index(train[index]) + 1}"


def test_memory_grows_by_numbers_and_not_by_texts(tmp_path, tokenizer):
    path = tmp_path / "train.jsonl"
    template = ChatTemplate(tokenizer)

    def peak(count):
        with path.open("w") as file:
            for index in range(count):
                file.write(json.dumps(row(f"{index} {'long ' * 60}")) + "\n")
        tracemalloc.start()
        module.check(Data(train=str(path)), template, (2,))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(1)  # what is loaded once
    few, many = peak(500), peak(3000)
    assert many - few < 2500 * 100  # a text alone has 300 bytes
