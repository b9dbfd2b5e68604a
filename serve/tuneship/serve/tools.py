"""Which of SGLang's parsers reads a model's tool calls, by the chat template that taught the model to write them."""

from __future__ import annotations

import re

_OTHER_TAGS = re.compile(r"<function=|<arg_key>|<tool_sep>|enable_thinking")
"""Of formats that put something else than JSON between `<tool_call>` and `</tool_call>`, or that SGLang knows."""


def parser(template: str) -> str:
    """SGLang's `--tool-call-parser` for `template`; empty where it shows the model no tools.

    `auto` is SGLang's own detection. 0.5.17 to 0.5.23 it knows Qwen3 and not Qwen2.5, Mistral and not Llama 3.
    """
    if not re.search(r"\btools\b", template):
        return ""
    if "<tool_call>" in template and not _OTHER_TAGS.search(template):
        return "qwen"
    if "python_tag" in template or ("ipython" in template and "<|start_header_id|>" in template):
        return "llama3"
    return "auto"
