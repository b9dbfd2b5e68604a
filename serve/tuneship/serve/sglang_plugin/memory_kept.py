"""Loading an adapter does not make the whole engine allocate anew.

Upstream gap: what SGLang logs before and after an adapter comes or goes holds the GPU's free memory, and to ask for
that it gives torch's whole cache back to the driver (`lora/lora_manager.py`, 0.5.17). That waits for the GPU, and the
next steps of every stream have to allocate again. When it asks without emptying the cache,
`tests/unit/serve/test_plugin.py` fails and says so.
"""

from __future__ import annotations

from functools import partial

from sglang.srt.lora import lora_manager


def install() -> None:
    """Ask for the free memory as it is; only there, because a hook of the function would reach all who import it."""
    lora_manager.get_available_gpu_memory = partial(lora_manager.get_available_gpu_memory, empty_cache=False)
