"""What a running SGLang prefills for messages and tools is what training rendered, key by key."""

from __future__ import annotations

import json
import shutil

import pytest

from tuneship.core.recipe import Data
from tuneship.serve.verify.door import DoorScorer

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

# Writes all that it is given, so that nothing differs unseen.
EVERYTHING = (
    "{{ tools | tojson }}{% for message in messages %}<|im_start|>{{ message | tojson }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
CALL = {"function": {"arguments": '{"city": "Paris"}', "name": "weather"}, "id": "call00001", "type": "function"}
ROWS = {
    "messages alone": {"messages": [{"content": "Rain?", "role": "user", "name": "Ann", "id": 7}]},
    "a tool in the short form": {"messages": [{"role": "user", "content": "Rain?"}], "tools": [WEATHER]},
    "calls and results": {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "Rain?"}, {"type": "text", "text": "Now?"}]},
            {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": "who knows"},
            {"role": "tool", "tool_call_id": "call00001", "name": "weather", "content": "rain"},
        ],
        "tools": json.dumps([{"function": WEATHER | {"description": "of a city", "strict": True}, "type": "function"}]),
    },
    "a call without an id": {
        "messages": [
            {"role": "user", "content": "Rain?"},
            {"role": "assistant", "content": "I look.", "tool_calls": [{"name": "weather", "arguments": {}}]},
            {"role": "tool", "content": ""},
        ]
    },
}


@pytest.fixture(scope="module")
def url(start_module_server, tiny_model, tmp_path_factory):
    model = tmp_path_factory.mktemp("everything") / "vicuna"  # by that word SGLang alone takes a template of its own
    shutil.copytree(tiny_model, model)
    (model / "chat_template.jinja").write_text(EVERYTHING)
    return start_module_server(str(model), "--dtype", "float32").wait_ready()


@pytest.mark.parametrize("name", ROWS)
async def test_a_server_gives_its_template_what_training_gave_it(url, tiny_model, name):
    from transformers import AutoTokenizer

    from tuneship.train.data import formats
    from tuneship.train.data.template import ChatTemplate

    answer = {"role": "assistant", "content": "yes"}
    row = ROWS[name] | {"messages": [*ROWS[name]["messages"], answer]}
    messages, tools, _ = formats.conversation(row, Data(train="x"))
    template = ChatTemplate(AutoTokenizer.from_pretrained(tiny_model), EVERYTHING)
    text = template.render(messages[:-1], tools=tools, for_generation=True)
    async with DoorScorer(url) as scorer:
        await scorer.served()
        ids = await scorer.tokenize(messages[:-1], tools)
    assert template.tokenizer.decode(ids) == text
    assert ids == template.tokenizer(text, add_special_tokens=False)["input_ids"]
