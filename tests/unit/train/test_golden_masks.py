"""Exactly the assistant's words and its end of turn carry loss: whole rows, span by span, under four families."""

from __future__ import annotations

import functools
import json
import re
from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils import chat_template_utils

from tests.unit.train import families
from tests.unit.train.families import TOOLS, Family, conversation, marked, spans
from tuneship.core.errors import DataError
from tuneship.train.data.template import IGNORED, Conversation

# As SGLang writes the tool of these conversations, whatever the order of keys in a row.
TOOL = (
    '{"type": "function", "function": {"description": "The weather of a city.", "name": "weather", '
    '"parameters": {"type": "object", "properties": {"city": {"type": "string"}}}, "strict": false}, '
    '"defer_loading": null}'
)
# {+What is trained+} stands in braces. Written out, so that whoever changes a line sees what a model would learn.
SMOLLM2 = """\
<|im_start|>system
Answer in few words.<|im_end|>
<|im_start|>user
Rain in Paris?<|im_end|>
<|im_start|>assistant
{+["Paris"]<|im_end|>+}
<|im_start|>tool
rain in Paris<|im_end|>
<|im_start|>assistant
{+Yes, rain.<|im_end|>+}
<|im_start|>user
And Rome?<|im_end|>
<|im_start|>assistant
{+I cannot
say.<|im_end|>+}
<|im_start|>user
Thanks!<|im_end|>
<|im_start|>assistant
{+Gladly.<|im_end|>+}
"""
QWEN25 = """\
<|im_start|>system
Answer in few words.

# Tools
<tools>
TOOL
</tools><|im_end|>
<|im_start|>user
Rain in Paris?<|im_end|>
<|im_start|>assistant
{+<tool_call>
{"name": "weather", "arguments": {"city": "Paris"}}
</tool_call>
<tool_call>
{"name": "weather", "arguments": {"city": "Rome"}}
</tool_call><|im_end|>+}
<|im_start|>user
<tool_response>
rain in Paris
</tool_response>
<tool_response>
rain in Rome
</tool_response><|im_end|>
<|im_start|>assistant
{+Yes, rain.<|im_end|>+}
<|im_start|>user
And Rome?<|im_end|>
<|im_start|>assistant
{+I cannot
say.<|im_end|>+}
<|im_start|>user
Thanks!<|im_end|>
<|im_start|>assistant
{+Gladly.<|im_end|>+}
"""
LLAMA3 = """\
<|begin_of_text|><|start_header_id|>system<|end_header_id|>

Environment: ipython
Today Date: 26 Jul 2024

Answer in few words.<|eot_id|><|start_header_id|>user<|end_header_id|>

Functions:

TOOL

Rain in Paris?<|eot_id|><|start_header_id|>assistant<|end_header_id|>

{+{"name": "weather", "parameters": {"city": "Paris"}}<|eot_id|>+}<|start_header_id|>ipython<|end_header_id|>

"rain in Paris"<|eot_id|><|start_header_id|>assistant<|end_header_id|>

{+Yes, rain.<|eot_id|>+}<|start_header_id|>user<|end_header_id|>

And Rome?<|eot_id|><|start_header_id|>assistant<|end_header_id|>

{+I cannot
say.<|eot_id|>+}<|start_header_id|>user<|end_header_id|>

Thanks!<|eot_id|><|start_header_id|>assistant<|end_header_id|>

{+Gladly.<|eot_id|>+}"""
MISTRAL = """\
<s>[AVAILABLE_TOOLS] [TOOL][/AVAILABLE_TOOLS][INST] Answer in few words.

Rain in Paris?[/INST]{+[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}, "id": "call00001"}]</s>+}\
[TOOL_RESULTS] {"content": rain in Paris, "call_id": "call00001"}[/TOOL_RESULTS]{+ Yes, rain.</s>+}\
[INST] And Rome?[/INST]{+ I cannot
say.</s>+}[INST] Thanks![/INST]{+ Gladly.</s>+}"""
# Mistral's own template, the last answer alone.
MISTRAL_V03 = """\
<s>[INST] Rain in Paris?[/INST]\
[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}, "id": "call00001"}]</s>\
[TOOL_RESULTS] {"content": rain in Paris, "call_id": "call00001"}[/TOOL_RESULTS] Yes, rain.</s>\
[INST] And Rome?[/INST] I cannot
say.</s>[AVAILABLE_TOOLS] [TOOL][/AVAILABLE_TOOLS][INST] Answer in few words.

Thanks![/INST]{+ Gladly.</s>+}"""
GOLDEN = {"smollm2": SMOLLM2, "qwen25": QWEN25, "llama3": LLAMA3, "mistral": MISTRAL}
CONVERSATIONS = {
    "smollm2": conversation(tools=False),
    "qwen25": conversation(calls=("Paris", "Rome")),
    "llama3": conversation(),
    "mistral": conversation(),
}
QWENS_CALLS = [
    '{"name": "weather", "arguments": {"city": "Paris"}}',
    '{"name": "weather", "arguments": {"city": "Rome"}}',
]
# Mistral's moves system message and tools to the last question: only without them all answers can be learnt.
UNDER_PUBLISHED = CONVERSATIONS | {"mistral": conversation(tools=False, system=False)}
LEARNT_UNDER_PUBLISHED = {
    "smollm2": ['["Paris"]<|im_end|>', "Yes, rain.<|im_end|>", "I cannot\nsay.<|im_end|>", "Gladly.<|im_end|>"],
    "qwen25": [
        "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in QWENS_CALLS) + "<|im_end|>",
        *("Yes, rain.<|im_end|>", "I cannot\nsay.<|im_end|>", "Gladly.<|im_end|>"),
    ],
    "llama3": [
        '{"name": "weather", "parameters": {"city": "Paris"}}<|eot_id|>',
        *("Yes, rain.<|eot_id|>", "I cannot\nsay.<|eot_id|>", "Gladly.<|eot_id|>"),
    ],
    "mistral": [' ["Paris"]</s>', " Yes, rain.</s>", " I cannot\nsay.</s>", " Gladly.</s>"],
}


@pytest.fixture(params=GOLDEN)
def name(request):
    return request.param


@functools.cache
def family(name: str) -> Family:
    return getattr(families, name)()


def golden(text: str) -> str:
    return text.replace("TOOL\n", f"{TOOL}\n").replace("[TOOL]", f"[{TOOL}]")


def test_what_is_trained_word_by_word(name):
    template = family(name).template
    assert marked(template, template.encode(CONVERSATIONS[name])) == golden(GOLDEN[name])


def test_only_the_last_answer(name):
    template = family(name).template
    *before, last, after = re.split(r"\{\+|\+\}", golden(GOLDEN[name]))
    found = marked(template, template.encode(CONVERSATIONS[name], "completion"))
    assert found == "".join(before) + "{+" + last + "+}" + after


def test_what_is_trained_under_published_templates(name, the_26th_of_july):
    template, given = families.published(name).template, UNDER_PUBLISHED[name]
    encoded = template.encode(given)
    assert spans(template, encoded)[1::2] == LEARNT_UNDER_PUBLISHED[name]
    *_, last = LEARNT_UNDER_PUBLISHED[name]
    assert spans(template, template.encode(given, "completion"))[1::2] == [last]
    text = template.tokenizer.decode(encoded.input_ids)
    assert text == template.tokenizer.apply_chat_template(
        *as_sglang_gives_it(given.messages, given.tools), tokenize=False
    )
    assert ("Today Date: 26 Jul 2024" in text) == (name == "llama3")


@pytest.fixture
def the_26th_of_july(monkeypatch):
    """Llama 3.2's template writes the day's date."""

    class Clock(datetime):
        @classmethod
        def now(cls, _tz=None):
            return cls(2024, 7, 26)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


@pytest.mark.parametrize("of", [family, families.published])
def test_the_ids_before_each_answer_are_a_servers(name, of, the_26th_of_july):
    given = (CONVERSATIONS if of is family else UNDER_PUBLISHED)[name]
    template, (messages, tools, _) = of(name).template, given
    encoded = template.encode(given)
    starts = [i for i in range(1, len(encoded.labels)) if encoded.labels[i - 1] == IGNORED != encoded.labels[i]]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(starts) == len(turns) == 4
    for start, turn in zip(starts, turns, strict=True):
        prompt = template.tokenizer.apply_chat_template(
            *as_sglang_gives_it(messages[:turn], tools), add_generation_prompt=True, return_dict=False
        )
        assert encoded.input_ids[:start] == prompt


def as_sglang_gives_it(messages, tools):
    """A request's messages and tools as the template of a server gets them, by SGLang's own models."""
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
    from sglang.srt.parser.jinja_template_utils import process_content_for_template_format

    request = ChatCompletionRequest.model_validate({"model": "m", "messages": messages, "tools": tools})
    given = [{"content": ""} | message.model_dump(exclude_none=True) for message in request.messages]
    whole = [process_content_for_template_format(message, "string", [], [], [], []) for message in given]
    return whole, [tool.model_dump() for tool in request.tools] if tools else None


@pytest.mark.parametrize(("name", "bos"), [("llama3", "<|begin_of_text|>"), ("mistral", "<s>")])
def test_bos_is_written_once_although_the_tokenizer_adds_it_too(name, bos):
    template = family(name).template
    bos_id = template.tokenizer.convert_tokens_to_ids(bos)
    assert template.tokenizer("a")["input_ids"][0] == bos_id
    assert template.encode(CONVERSATIONS[name]).input_ids.count(bos_id) == 1


@pytest.mark.parametrize(("name", "default"), [("smollm2", "You are Smol."), ("qwen25", "You are Qwen.")])
def test_the_templates_own_system_message_is_there_and_not_trained(name, default):
    template = family(name).template
    first, *_ = spans(
        template, template.encode(CONVERSATIONS[name]._replace(messages=CONVERSATIONS[name].messages[1:]))
    )
    assert first.startswith(f"<|im_start|>system\n{default}")


# The published one writes a result as JSON.
MISTRALS = [
    (families.mistral_v03, MISTRAL_V03),
    (lambda: families.published("mistral"), MISTRAL_V03.replace("rain in Paris,", '"rain in Paris",')),
]


@pytest.mark.parametrize(("of", "wanted"), MISTRALS)
def test_mistrals_own_template_is_trained_as_it_is_served_the_last_answer_alone(of, wanted):
    template = of().template
    with pytest.raises(DataError, match="before message 2 differently once the conversation goes on") as refused:
        template.encode(conversation())
    assert "completion" in refused.value.hint
    encoded = template.encode(conversation(), "completion")
    assert marked(template, encoded) == golden(wanted)
    assert template.encode(conversation(), "all").input_ids == encoded.input_ids


def test_that_refusal_is_right():
    """A server prefills the system message before the second answer, and the whole conversation has it elsewhere."""
    tokenizer = families.published("mistral").template.tokenizer
    messages = conversation(tools=False).messages
    asked = tokenizer.apply_chat_template(messages[:-3], tokenize=False, add_generation_prompt=True)
    assert asked.endswith("[INST] Answer in few words.\n\nAnd Rome?[/INST]")
    whole = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert whole.endswith("[INST] And Rome?[/INST] I cannot\nsay.</s>[INST] Answer in few words.\n\nThanks![/INST]")


@pytest.mark.parametrize("of", [of for of, _ in MISTRALS])
def test_mistrals_own_template_keeps_the_system_message_of_a_single_question(of):
    template = of().template
    system, user, *_, answer = conversation().messages
    found = marked(template, template.encode(Conversation([system, user, answer])))
    assert found == "<s>[INST] Answer in few words.\n\nRain in Paris?[/INST]{+ Gladly.</s>+}"


def test_an_answer_that_loses_its_thoughts_later_is_refused():
    """Qwen3's template takes them out of earlier answers."""
    template = families.published("qwen3").template
    thought = {"role": "assistant", "content": "<think>\nIs it?\n</think>\n\nYes."}
    user = {"role": "user", "content": "Rain?"}
    with pytest.raises(DataError, match="renders message 1 differently in mid-conversation") as refused:
        template.encode(Conversation([user, thought, user, thought]))
    assert "completion" in refused.value.hint
    (_, learnt, _) = spans(template, template.encode(Conversation([user, thought, user, thought]), "completion"))
    assert learnt == "<think>\nIs it?\n</think>\n\nYes.<|im_end|>"


def test_tools_that_a_template_leaves_out_are_refused():
    template = families.smollm2().template
    with pytest.raises(DataError, match="writes no tools"):
        template.encode(conversation(tools=False)._replace(tools=TOOLS))
    with pytest.raises(DataError, match="writes no tool calls"):
        template.encode(conversation()._replace(tools=None))


words = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\u2581"), min_size=1, max_size=12)
lines = st.sampled_from(
    ["two\nlines", "a\n\n\nb", "  in  between ", "</tool_call>", "<|im_end", "[INST", "{{ x }}", "Ümläut"]
)
texts = st.lists(words | lines, min_size=1, max_size=3).map(" ".join).map(str.strip).filter(bool)
turns = st.lists(st.tuples(texts, st.none() | texts, texts), min_size=1, max_size=4)


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(sorted(GOLDEN)), st.sampled_from([family, families.published]), st.none() | texts, turns)
def test_trained_is_what_the_assistant_says_and_its_end_of_turn(name, of, system, turns):
    """`turns` are (question, the argument of a call before the answer or None, answer)."""
    template, end, call, before = of(name)
    if (name, of) == ("mistral", families.published):
        system = None
    messages = [{"role": "system", "content": system}] if system else []
    wanted = []
    for question, city, answer in turns:
        messages.append({"role": "user", "content": question})
        if city and call:
            messages.append({"role": "assistant", "content": None, "tool_calls": [families.call(city)]})
            messages.append({"role": "tool", "content": question, "tool_call_id": "call00001"})
            wanted.append(call.replace("{0}", json.dumps({"city": city}, ensure_ascii=False)) + end)
        messages.append({"role": "assistant", "content": answer})
        wanted.append(before + answer + end)
    encoded = template.encode(Conversation(messages))
    assert spans(template, encoded)[1::2] == wanted
