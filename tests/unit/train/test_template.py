"""What a chat template is held to: by verify, by generation's end, and where it cannot be trained with at all."""

from __future__ import annotations

import pytest

from tests.unit.train import families
from tests.unit.train.families import marked, spans
from tuneship.core import chat_templates
from tuneship.core.errors import DataError, RecipeError
from tuneship.core.parity import ReferenceRow
from tuneship.serve.verify.rendering import first_difference
from tuneship.train.data.template import ChatTemplate, Conversation, end_token_ids

MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "uno"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "dos tres"},
]
CONVERSATION = Conversation(MESSAGES)

FAMILIES = ("smollm2", "qwen25", "llama3", "mistral")


@pytest.fixture(params=FAMILIES)
def family(request):
    made = getattr(families, request.param)()
    return made.template, made.end


def test_all_loss_learns_everything(family):
    template, _ = family
    encoded = template.encode(CONVERSATION, "all")
    assert encoded.labels == encoded.input_ids


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
    assert spans(template, template.encode(CONVERSATION, "completion"))[1:] == ["dos tres<|im_end|>"]


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


def test_what_the_template_itself_refuses_is_one_clear_error(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="roles must alternate"):
        ChatTemplate(tokenizer).render(MESSAGES)


def test_a_closing_tag_is_no_end_of_turn():
    tokenizer = families.qwen25().template.tokenizer
    template = ChatTemplate(tokenizer, "{% for m in messages %}{{ m.content }}\n{% endfor %}")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<tool_call>b</tool_call>"}]
    with pytest.raises(DataError, match="no end-of-turn token") as refused:
        template.encode(Conversation(messages))
    assert "eos_token" in refused.value.hint


def test_content_that_is_null_is_an_empty_text_as_a_server_has_it(tokenizer):
    template = ChatTemplate(tokenizer, "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}")
    messages = [*MESSAGES[:2], {"role": "assistant", "content": None}]
    assert template.render(messages) == "systembe briefuseroneassistant"


def test_several_named_templates_are_refused_by_name(tokenizer):
    tokenizer.chat_template = {"default": "a", "tool_use": "b"}
    with pytest.raises(DataError, match="several chat templates: default, tool_use"):
        ChatTemplate(tokenizer)


ALPACA = """\
be brief

### Instruction:
one

### Response:
{+uno<|im_end|>+}

### Instruction:
two

### Response:
{+dos tres<|im_end|>+}

"""


def test_alpaca_gives_a_base_without_template_one_that_is_saved_with_it(tokenizer, tmp_path):
    tokenizer.chat_template = None
    template = ChatTemplate(tokenizer, chat_templates.BUILTIN["alpaca"])
    assert marked(template, template.encode(CONVERSATION)) == ALPACA
    assert (template.source, template.text) == ("recipe", chat_templates.BUILTIN["alpaca"])
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == template.text


def test_alpaca_begins_with_a_bos_of_its_own_and_with_no_other():
    for make, bos in ((families.llama3, "<|begin_of_text|>"), (families.mistral, "<s>"), (families.qwen25, "")):
        template = ChatTemplate(make().template.tokenizer, chat_templates.BUILTIN["alpaca"])
        assert template.render(MESSAGES).startswith(f"{bos}be brief\n\n### Instruction:\n")
    tokenizer = families.smollm2().template.tokenizer
    tokenizer.bos_token = tokenizer.eos_token
    assert ChatTemplate(tokenizer, chat_templates.BUILTIN["alpaca"]).render(MESSAGES).startswith("be brief")


def test_a_builtin_has_no_turn_for_a_tool_unless_it_knows_tools(tokenizer):
    template = ChatTemplate(tokenizer, chat_templates.BUILTIN["alpaca"])
    with pytest.raises(DataError, match="alpaca template has no turn for tool"):
        template.render([*MESSAGES, {"role": "tool", "content": "x"}])


def test_a_template_is_a_builtin_a_file_or_jinja_itself(tmp_path):
    (tmp_path / "mine.jinja").write_text("{{ messages }}")
    assert chat_templates.resolve("", tmp_path) == ""
    assert chat_templates.resolve("chatml", tmp_path) == chat_templates.BUILTIN["chatml"]
    assert chat_templates.resolve("mine.jinja", tmp_path) == "{{ messages }}"
    assert chat_templates.resolve("{% if x %}{% endif %}", tmp_path) == "{% if x %}{% endif %}"
    with pytest.raises(RecipeError, match=r"no file at .*nope\.jinja") as refused:
        chat_templates.resolve("nope.jinja", tmp_path)
    assert "alpaca, chatml, mistral" in refused.value.hint


def test_a_base_without_template_takes_plain_text_alone(tokenizer):
    tokenizer.chat_template = None
    template = ChatTemplate(tokenizer)
    with pytest.raises(DataError, match="no chat template"):
        template.encode(CONVERSATION)
    row = template.encode(Conversation([], text="the invoice"))
    assert spans(template, row) == ["", "the invoice<|im_end|>"]
    assert end_token_ids(template, [7]) == (tokenizer.eos_token_id, 7)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end token"):
        end_token_ids(template, [7])


@pytest.mark.parametrize("loss", ["assistant", "completion", "all"])
def test_a_text_has_one_bos_and_one_end_and_is_learnt_whole(loss):
    template = families.llama3().template
    for text in ("a b", "<|begin_of_text|>a b", "a b<|eot_id|>", "<|begin_of_text|>a b<|eot_id|>"):
        row = template.encode(Conversation([], text=text), loss)
        assert spans(template, row) == ["", "<|begin_of_text|>a b<|eot_id|>"]
