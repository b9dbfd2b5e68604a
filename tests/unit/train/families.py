"""Chat templates of four families, with small tokenizers of the same make: what differs between them, and no more.

The templates are written for these tests. What they keep of the real ones: special tokens, turns, who writes BOS, where
system messages and tools go, how calls and results look, white space. `published` are the real ones, as packages that
are installed carry them.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tuneship.core import chat_templates
from tuneship.core.model_source import BUNDLED_PACKAGE
from tuneship.train import fetch
from tuneship.train.data.template import ChatTemplate, Conversation, Encoded

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
_CORPUS = (
    "system user assistant ipython tool",
    "Answer in few words.",
    "Rain in Paris?",
    "And Rome?",
    "Thanks!",
    "name arguments",
)


class Family(NamedTuple):
    """A template and its tokenizer; `end` is the end-of-turn token."""

    template: ChatTemplate
    end: str
    call: str = ""
    """How a call is written, {0} for its arguments; empty: this template writes none."""
    before: str = ""
    """What the template writes between the prompt and an answer's text."""


def smollm2() -> Family:
    """ChatML with a system message of its own; knows no tools, and writes a tool's turn like any other."""
    tokenizer = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"})
    template = (
        "{% for m in messages %}"
        "{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nYou are Smol.<|im_end|>\n{% endif %}"
        "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return Family(ChatTemplate(tokenizer, template), "<|im_end|>")


def qwen25() -> Family:
    """ChatML; tools in the system turn, `<tool_call>` blocks, tool results that follow each other in one user turn."""
    tokenizer = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<tool_call>", "</tool_call>"])
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
    line = "{{ '\\n' }}"  # a bare one is lost behind a tag
    template = (
        "{% set first = messages[0]['content'] if messages[0].role == 'system' else 'You are Qwen.' %}"
        "<|im_start|>system\n{{ first }}"
        "{% if tools %}{{ '\\n\\n' }}# Tools\n<tools>"
        f"{{% for tool in tools %}}{line}{{{{ tool | tojson }}}}{{% endfor %}}{line}</tools>{{% endif %}}<|im_end|>\n"
        "{% for m in messages %}{% if m.role == 'tool' %}"
        "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
        f"{line}<tool_response>\n{{{{ m.content }}}}\n</tool_response>"
        "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
        "{% elif m.role == 'assistant' and m.tool_calls %}<|im_start|>assistant"
        f"{{% if m.content %}}{line}{{{{ m.content }}}}{{% endif %}}"
        f"{{% for call in m.tool_calls %}}{line}<tool_call>\n"
        '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
        "{% endfor %}<|im_end|>\n"
        "{% elif not (loop.first and m.role == 'system') %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    written = '<tool_call>\n{"name": "weather", "arguments": {0}}\n</tool_call>'
    return Family(ChatTemplate(tokenizer, template), "<|im_end|>", written)


def llama3() -> Family:
    """BOS from the template, though its tokenizer adds one too; headers; tools in the first user turn; `ipython`."""
    words = ("begin_of_text", "start_header_id", "end_header_id", "eot_id", "eom_id", "python_tag")
    tokenizer = _byte_level([f"<|{word}|>" for word in words], bos="<|begin_of_text|>")
    tokenizer.add_special_tokens({"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"})
    head = "<|start_header_id|>{0}<|end_header_id|>\n\n".format
    template = (
        "{{ bos_token }}"
        "{% set system, rest = '', messages %}"
        "{% if messages[0].role == 'system' %}{% set system, rest = messages[0].content, messages[1:] %}{% endif %}"
        + head("system")
        + "{% if tools %}Environment: ipython\n{% endif %}Today Date: 26 Jul 2024\n\n{{ system | trim }}<|eot_id|>"
        "{% for m in rest %}"
        "{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
        "{% set call = m.tool_calls[0].function %}"
        + head("assistant")
        + '{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}<|eot_id|>'
        "{% elif m.role == 'tool' %}" + head("ipython") + "{{ m.content | tojson }}<|eot_id|>"
        "{% else %}"
        + head("{{ m.role }}")
        + "{% if loop.first and tools %}Functions:\n\n{% for t in tools %}{{ t | tojson }}\n\n{% endfor %}{% endif %}"
        "{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}" + head("assistant") + "{% endif %}"
    )
    return Family(ChatTemplate(tokenizer, template), "<|eot_id|>", '{"name": "weather", "parameters": {0}}')


def mistral() -> Family:
    """`[INST]` around users, system message and tools in the first of them; EOS after answers, a space before them."""
    return _mistral(chat_templates.BUILTIN["mistral"])


def mistral_v03() -> Family:
    """As Mistral's own from v0.3 on: tools in the last user turn; the system message too, while that has no answer."""
    return _mistral(
        "{% set system, rest = '', messages %}"
        "{% if messages[0].role == 'system' %}{% set system, rest = messages[0].content, messages[1:] %}{% endif %}"
        "{% set users = rest | selectattr('role', 'equalto', 'user') | list %}"
        "{{ bos_token }}{% for m in rest %}"
        "{% if m.role == 'user' %}"
        "{% if tools and m == users[-1] %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
        "[INST] {% if system and loop.last %}{{ system + '\\n\\n' }}{% endif %}{{ m.content }}[/INST]"
        "{% elif m.tool_calls %}[TOOL_CALLS] [{% for call in m.tool_calls %}"
        "{% if call.id | length != 9 %}{{ raise_exception('call ids have 9 characters') }}{% endif %}"
        """{{ (call.function | tojson)[:-1] }}, "id": "{{ call.id }}"}{% if not loop.last %}, {% endif %}"""
        "{% endfor %}]{{ eos_token }}"
        "{% elif m.role == 'tool' %}"
        """[TOOL_RESULTS] {"content": {{ m.content }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]"""
        "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
    )


@functools.cache
def published(name: str) -> Family:
    """One of the families above under the template that its models come with."""
    makes = {"smollm2": smollm2, "qwen25": qwen25, "qwen3": qwen25, "llama3": llama3, "mistral": mistral}
    imitated = makes[name]()
    return imitated._replace(template=ChatTemplate(imitated.template.tokenizer, _published(name)))


def call(city: str) -> dict:
    """A call of the tool, its arguments as the object that templates expect."""
    return {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": city}}}


def conversation(*, calls: Sequence[str] = ("Paris",), tools: bool = True, system: bool = True) -> Conversation:
    """System, a call and its result, three questions and answers; the call is text where there are no `tools`."""
    asked = {"tool_calls": [call(city) for city in calls], "content": None} if tools else {"content": json.dumps(calls)}
    results = [{"role": "tool", "content": f"rain in {city}", "tool_call_id": "call00001"} for city in calls]
    messages = [
        {"role": "system", "content": "Answer in few words."},
        {"role": "user", "content": "Rain in Paris?"},
        {"role": "assistant", **asked},
        *results,
        {"role": "assistant", "content": "Yes, rain."},
        {"role": "user", "content": "And Rome?"},
        {"role": "assistant", "content": "I cannot\nsay."},
        {"role": "user", "content": "Thanks!"},
        {"role": "assistant", "content": "Gladly."},
    ]
    return Conversation(messages[not system :], TOOLS if tools else None)


def spans(template: ChatTemplate, encoded: Encoded) -> list[str]:
    """The text of a row, cut where loss begins and ends: the odd ones are trained."""
    cuts = [0, *(i for i, (a, b) in enumerate(itertools.pairwise([0, *encoded.loss_mask])) if a != b)]
    # Decoded from the start each time: a decoder that drops the first space of a text would drop one of every span.
    texts = [template.tokenizer.decode(encoded.input_ids[:cut]) for cut in [*cuts, len(encoded.input_ids)]]
    return [after[len(before) :] for before, after in itertools.pairwise(texts)]


def marked(template: ChatTemplate, encoded: Encoded) -> str:
    """The text of a row, {+what is trained+} in braces."""
    found = enumerate(spans(template, encoded))
    return "".join(f"{{+{text}+}}" if index % 2 else text for index, text in found)


def _published(name: str) -> str:
    """Of the bundled model, of TRL's collection, or as Mistral's own package makes it for tokenizers of v3."""
    if name == "smollm2":
        from gguf import GGUFReader

        gguf = metadata.distribution(BUNDLED_PACKAGE).locate_file(fetch._GGUF)
        return GGUFReader(str(gguf)).fields["tokenizer.chat_template"].contents()
    if name == "mistral":
        from mistral_common.integrations.chat_templates.template_generator import TemplateConfig, build_chat_template
        from mistral_common.tokens.tokenizers.base import TokenizerVersion

        return build_chat_template(TemplateConfig(version=TokenizerVersion.v3, spm=True))
    file = {"qwen25": "qwen2_5", "qwen3": "qwen3", "llama3": "llama3_2"}[name]
    return Path(str(metadata.distribution("trl").locate_file(f"trl/chat_templates/{file}.jinja"))).read_text()


def _mistral(template: str) -> Family:
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"]
    tokenizer = _metaspace([*special, "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"])
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    call = '[TOOL_CALLS] [{"name": "weather", "arguments": {0}, "id": "call00001"}]'
    return Family(ChatTemplate(tokenizer, template), "</s>", call, " ")


def _byte_level(special: list[str], plain: Sequence[str] = (), bos: str = "") -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    return _finished(tokenizer, trainer, special, plain, bos)


def _metaspace(special: list[str]) -> PreTrainedTokenizerFast:
    """As SentencePiece's: words carry the space before them, unknown characters fall back to bytes, BOS is added."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*special, *bytes_], show_progress=False)
    return _finished(tokenizer, trainer, special, (), "<s>")


def _finished(
    tokenizer: Tokenizer, trainer: trainers.BpeTrainer, special: list[str], plain: Sequence[str], bos: str
) -> PreTrainedTokenizerFast:
    tokenizer.train_from_iterator(_CORPUS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in plain])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
