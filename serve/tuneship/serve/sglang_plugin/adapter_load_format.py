"""How an adapter's file is read: as what it is, and in little time, for every stream waits for it.

Upstream gaps: an adapter's weights are read with the load configuration of its base (`lora/lora.py`, 0.5.17 to 0.5.23).
The reader of plain safetensors refuses `bitsandbytes` with "Unknown load_format", and an adapter is never packed,
whatever its base is. And it starts a pool of threads for an adapter's one file, which takes longer than to read that.
When an engine with a 4-bit base and an adapter starts without this hook, the first gap is mended:
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
    """Give an adapter a load configuration of its own; the base's stays what it is."""
    own = copy.copy(adapter.load_config)
    own.model_loader_extra_config = {**own.model_loader_extra_config, "enable_multithread_load": False}
    if own.load_format == LoadFormat.BITSANDBYTES:
        own.load_format = LoadFormat.AUTO
    adapter.load_config = own
