"""`data.template`: chat templates for models that have none, as Jinja source.

A recipe names one of these, a file, or writes the source itself; `resolve` makes the source of all three.
"""

from __future__ import annotations

from pathlib import Path

from tuneship.core.errors import RecipeError

# A base's BOS is written where it is a token of its own; where it is the end token too (GPT-2's family), texts do not
# begin with it.
_BOS = "{% if bos_token is defined and bos_token and bos_token != eos_token %}{{ bos_token }}{% endif %}"

_ALPACA = (
    _BOS + "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}### Response:\n{{ message['content'] }}{{ eos_token }}\n\n"
    "{% elif message['role'] == 'user' %}### Instruction:\n{{ message['content'] }}\n\n"
    "{% elif message['role'] == 'system' %}{{ message['content'] }}\n\n"
    "{% else %}{{ raise_exception('the alpaca template has no turn for ' + message['role']) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}### Response:\n{% endif %}"
)
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Mistral's own templates (v0.3 on) write the system message into the last user turn, and only while that waits for its
# answer: what was said before an earlier answer then depends on how the conversation goes on.
_MISTRAL = (
    "{% set system, rest = '', messages %}"
    "{% if messages[0]['role'] == 'system' %}{% set system, rest = messages[0]['content'], messages[1:] %}{% endif %}"
    "{{ bos_token }}{% for message in rest %}"
    "{% if message['role'] == 'user' %}"
    "{% if loop.first and tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST] {% if loop.first and system %}{{ system + '\\n\\n' }}{% endif %}{{ message['content'] }}[/INST]"
    "{% elif message['role'] == 'assistant' and message['tool_calls'] %}[TOOL_CALLS] ["
    "{% for call in message['tool_calls'] %}{{ (call['function'] | tojson)[:-1] }}, "
    """"id": "{{ call['id'] }}"}{% if not loop.last %}, {% endif %}{% endfor %}]{{ eos_token }}"""
    "{% elif message['role'] == 'assistant' %} {{ message['content'] | trim }}{{ eos_token }}"
    "{% elif message['role'] == 'tool' %}[TOOL_RESULTS] "
    """{"content": {{ message['content'] }}, "call_id": "{{ message['tool_call_id'] }}"}[/TOOL_RESULTS]"""
    "{% else %}{{ raise_exception('the mistral template has no turn for ' + message['role']) }}{% endif %}{% endfor %}"
)

BUILTIN = {"alpaca": _ALPACA, "chatml": _CHATML, "mistral": _MISTRAL}
"""{short name: Jinja source}. `alpaca` needs no token but the tokenizer's EOS, the others those of their families.
`mistral` is Mistral v0.3's with system message and tools in the first user turn, where they stay."""


def resolve(value: str, folder: Path) -> str:
    """Jinja source of what `data.template` says; a file's path is relative to `folder`. Empty for an empty value.

    Raises:
        RecipeError: neither a builtin's name, nor Jinja, nor a file that can be read.

    """
    if not value or is_source(value):
        return value
    if value in BUILTIN:
        return BUILTIN[value]
    try:
        return (folder / value).read_text(encoding="utf-8")
    except FileNotFoundError:
        known = ", ".join(BUILTIN)
        raise RecipeError(
            f"data.template: no file at {folder / value}", hint=f"a Jinja file, Jinja itself, or one of: {known}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"data.template: cannot read {folder / value}: {error}") from None


def is_source(value: str) -> bool:
    """Whether `value` is Jinja, and not a name or a path."""
    return "{{" in value or "{%" in value
