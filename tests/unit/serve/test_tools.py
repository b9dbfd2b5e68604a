"""A model's tool calls are read as its own chat template writes them."""

from __future__ import annotations

import pytest

from tuneship.serve.tools import parser

CHATML = "{% for message in messages %}<|im_start|>{{ message['role'] }}{% endfor %}"
QWEN = """{%- if tools %}# Tools {{ tools | tojson }}
<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}\\n</tool_call>{% endif %}"""
LLAMA = """{%- if builtin_tools is defined or tools is not none %}<|start_header_id|>Environment: ipython{%- endif %}"""


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        ("", ""),
        (CHATML, ""),
        ("my toolset", ""),
        (QWEN, "qwen"),
        (LLAMA, "llama3"),
        (QWEN + "{% if enable_thinking %}{% endif %}", "auto"),
        ("{% if tools %}<tool_call><function=name>{% endif %}", "auto"),
        ("{% if tools %}[AVAILABLE_TOOLS][TOOL_CALLS]{% endif %}", "auto"),
    ],
)
def test_the_parser_is_the_templates(template, wanted):
    assert parser(template) == wanted
