"""`data show` prints the row that is trained, whole."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.train import families
from tuneship.core.recipe import Data
from tuneship.train.data import show
from tuneship.train.data.template import IGNORED, Conversation, Encoded

FAMILIES = ("smollm2", "qwen25", "llama3", "mistral")


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_shown_is_the_rendered_row_with_what_is_trained(name):
    family = getattr(families, name)()
    conversation = families.conversation(tools=name != "smollm2")
    spans = list(show.spans(family.template.encode(conversation), family.template.tokenizer))
    assert "".join(span.text for span in spans) == family.template.render(
        conversation.messages, tools=conversation.tools
    )
    trained = [span.text for span in spans if span.is_trained]
    assert trained[1:] == [f"{family.before}{text}{family.end}" for text in ("Yes, rain.", "I cannot\nsay.", "Gladly.")]


TEMPLATE = families.qwen25().template


@settings(deadline=None)
@given(st.lists(st.tuples(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.booleans())))
def test_no_text_is_lost_wherever_loss_begins(parts):
    """Each part is of whole characters, as the parts of a conversation are."""
    row = Encoded([], [])
    for text, is_trained in parts:
        ids = TEMPLATE.tokenizer(text, add_special_tokens=False)["input_ids"]
        row.input_ids.extend(ids)
        row.labels.extend(ids if is_trained else [IGNORED] * len(ids))
    wanted = [
        ("".join(text for text, _ in group), is_trained)
        for is_trained, group in itertools.groupby(parts, key=lambda part: part[1])
    ]
    assert list(show.spans(row, TEMPLATE.tokenizer)) == wanted


def test_the_first_rows_come_and_a_refused_one_says_why(tmp_path):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a"}, {"prompt": "c", "completion": "d " * 99}] * 2
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, keys, long, *more = show.show(str(path), Data(train="x", max_length=64), TEMPLATE, 4)
    assert len(more) == 1
    encoded = TEMPLATE.encode(Conversation([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]))
    assert (first.place, first.tokens, first.loss_tokens) == (
        "rows.jsonl:1",
        len(encoded.input_ids),
        encoded.loss_tokens,
    )
    assert [span.text for span in first.spans if span.is_trained] == ["b<|im_end|>"]
    assert keys.refused.startswith("has the keys prompt")
    assert "over data.max_length = 64" in long.refused
