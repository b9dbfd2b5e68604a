"""Entry point `sglang.srt.plugins`: hooks that engines of ours need on every device.

Every SGLang in this environment imports this module in each of its processes, also those that are none of our business.
So it imports nothing at the top, and it does nothing unless our launcher asked.
"""

from __future__ import annotations

import os
from importlib import import_module

_HOOKS = (
    "adapter_reading",
    "adapter_staging",
    "adapters_in_use",
    "memory_kept",
    "own_template",
    "segments_in_use",
    "tokenizer_length",
)
"""Modules beside this one, each with an `install`; they load torch."""


def activate() -> None:
    """Hang in our hooks, in an engine of ours."""
    from tuneship.serve.sglang_plugin.platform import ENGINE_VARIABLE  # noqa: PLC0415 - see above

    if os.environ.get(ENGINE_VARIABLE) != "1":
        return
    for name in _HOOKS:
        import_module(f"{__package__}.{name}").install()
