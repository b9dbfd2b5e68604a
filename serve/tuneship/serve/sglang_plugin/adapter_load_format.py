"""Adapters on a base that is loaded as bitsandbytes.

Upstream gap: an adapter's weights are read with the load format of its base (`lora/lora.py`, 0.5.17 to 0.5.23), and the
reader of plain safetensors refuses `bitsandbytes` with "Unknown load_format". An adapter is never packed, whatever its
base is. When an engine with a 4-bit base and an adapter starts without this hook, the gap is mended:
`tests/unit/serve/test_plugin.py` then fails and says so.
"""

from __future__ import annotations

import copy
from typing import Any

from sglang.srt.configs.load_config import LoadFormat
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

HOOKED = "sglang.srt.lora.lora.LoRAAdapter.initialize_weights"


def install() -> None:
    """Read every adapter as what its files are."""
    HookRegistry.register(HOOKED, read_as_it_is, HookType.BEFORE)
    HookRegistry.apply_hooks()


def read_as_it_is(adapter: Any) -> None:
    """Give an adapter on a bitsandbytes base a load format of its own; the base's stays what it is."""
    if adapter.load_config.load_format == LoadFormat.BITSANDBYTES:
        adapter.load_config = copy.copy(adapter.load_config)
        adapter.load_config.load_format = LoadFormat.AUTO
