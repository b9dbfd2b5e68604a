"""A model is asked under its own chat template, whatever the folders above it are called.

Upstream gap: SGLang takes one of its built-in templates for a model whose path holds a word such as `points`, `vicuna`,
`janus`, `whisper` or `unlimited` (0.5.17), also where the checkpoint has a template of its own: a run or a user of that
name would be prompted otherwise than in training. When it looks at the checkpoint first,
`tests/unit/serve/test_plugin.py` fails and says so.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

HOOKED = "sglang.srt.parser.template_manager.TemplateManager.guess_chat_template_from_model_path"


def install() -> None:
    """Let SGLang guess nothing."""
    HookRegistry.register(HOOKED, _guess_nothing, HookType.REPLACE)
    HookRegistry.apply_hooks()


def _guess_nothing(manager: Any, model_path: str) -> None:
    """What is left is the checkpoint's own template."""
