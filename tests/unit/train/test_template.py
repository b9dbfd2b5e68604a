"""Which tokens carry loss, under four families of chat template, and that the ids are the server's."""

from __future__ import annotations

import pytest

from tuneship.core.errors import DataError
from tuneship.core.parity import ReferenceRow
from tuneship.serve.verify.rendering import first_difference
from tuneship.train.data.template import IGNORED, ChatTemplate, Conversation, end_token_ids

MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "uno"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "dos tres"},
]
CONVERSATION = Conversation(MESSAGES)

CHATML_WITH_DEFAULT_SYSTEM = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nbe good<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}</s>"
    "{% elif m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %}[INST] {{ m['content'] }} [/INST] ok</s>"
    "{% endif %}{% endfor %}"
)
FAMILIES = {
    "smollm2": (CHATML_WITH_DEFAULT_SYSTEM, "<|im_end|>", []),
    "qwen2.5": (CHATML_WITH_DEFAULT_SYSTEM, "<|im_end|>", []),
    "llama-3": (LLAMA3, "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|bos|>"]),
    "mistral": (MISTRAL, "</s>", ["[INST]", "[/INST]", "</s>", "<|bos|>"]),
}


@pytest.fixture(params=FAMILIES)
def family(request, tokenizer):
    text, end, extra = FAMILIES[request.param]
    tokenizer.add_special_tokens({"additional_special_tokens": extra, "bos_token": "<|bos|>"} if extra else {})
    tokenizer.chat_template = text
    return ChatTemplate(tokenizer), end


def trained_text(template: ChatTemplate, encoded) -> list[str]:
    """The spans with loss, decoded."""
    spans: list[list[int]] = []
    previous = IGNORED
    for label in encoded.labels:
        if label != IGNORED:
            if previous == IGNORED:
                spans.append([])
            spans[-1].append(label)
        previous = label
    return [template.tokenizer.decode(span) for span in spans]


def test_exactly_the_assistants_words_and_end_of_turn_carry_loss(family):
    template, end = family
    encoded = template.encode(CONVERSATION)
    assert [text.strip() for text in trained_text(template, encoded)] == [f"uno{end}", f"dos tres{end}"]


def test_completion_loss_learns_the_last_answer_alone(family):
    template, end = family
    encoded = template.encode(CONVERSATION, "completion")
    assert [text.strip() for text in trained_text(template, encoded)] == [f"dos tres{end}"]


def test_all_loss_learns_everything(family):
    template, _ = family
    encoded = template.encode(CONVERSATION, "all")
    assert encoded.labels == encoded.input_ids


def test_the_ids_before_an_answer_are_those_a_server_would_prefill(family):
    template, _ = family
    encoded = template.encode(CONVERSATION, "completion")
    first = next(i for i, label in enumerate(encoded.labels) if label != IGNORED)
    served = template.tokenizer.apply_chat_template(MESSAGES[:-1], add_generation_prompt=True, return_dict=False)
    assert encoded.input_ids[:first] == served


@pytest.mark.parametrize("loss", ["assistant", "completion", "all"])
def test_verify_finds_the_prompt_in_what_training_kept(family, loss):
    template, _ = family
    encoded = template.encode(CONVERSATION, loss)
    row = ReferenceRow(
        input_ids=encoded.input_ids,
        loss_mask=encoded.loss_mask,
        dtype="float32",
        base=[],
        trained=[],
        messages=list(encoded.messages),
    )
    assert row.messages == MESSAGES
    served = template.tokenizer.apply_chat_template(row.messages[:-1], add_generation_prompt=True, return_dict=False)
    assert first_difference(row, served) is None
    assert first_difference(row, [*served[:-1], 0]) == len(served) - 1


def test_there_is_one_bos_at_most(family):
    template, _ = family
    ids = template.encode(CONVERSATION).input_ids
    assert ids.count(template.tokenizer.convert_tokens_to_ids("<|bos|>")) <= 1


def test_the_end_of_turn_comes_first_among_the_end_tokens(family):
    template, end = family
    assert end_token_ids(template, [0]) == (template.tokenizer.convert_tokens_to_ids(end), 0)


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['content'] if loop.last or m['role'] != 'assistant' }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    template = ChatTemplate(tokenizer)
    with pytest.raises(DataError, match="message 2 differently"):
        template.encode(CONVERSATION)
    assert trained_text(template, template.encode(CONVERSATION, "completion")) == ["dos tres<|im_end|>"]


def test_a_template_without_end_of_turn_is_refused(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(DataError, match="no end-of-turn token"):
        ChatTemplate(tokenizer).encode(CONVERSATION)


def test_a_prompt_that_melts_into_the_answer_is_refused(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['content'] }}{% if m['role'] == 'assistant' %}<|im_end|>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>the inv{% endif %}"
    )
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "the invoice"}]
    with pytest.raises(DataError, match="into one token"):
        ChatTemplate(tokenizer).encode(Conversation(messages))


def test_a_base_without_template_is_refused(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        ChatTemplate(tokenizer).encode(CONVERSATION)


def test_what_the_template_itself_refuses_is_one_clear_error(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="roles must alternate"):
        ChatTemplate(tokenizer).render(MESSAGES)
