"""LoRA without pinned host memory.

Upstream gap: SGLang's LoRA code asks for pinned memory without asking whether there is any (`pin_memory=True` and
`.pin_memory()` in `lora/layers.py` and `lora/backend/torch_backend.py`; 0.5.17 to 0.5.23), and torch refuses that where
there is no accelerator. Elsewhere SGLang asks `is_pin_memory_available()` first; once its LoRA code does too, an engine
with adapters starts on a CPU without these hooks: `tests/unit/serve/test_plugin.py` then fails and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from torch.overrides import TorchFunctionMode

_MANAGER = "sglang.srt.lora.lora_manager.LoRAManager"
HOOKED = (f"{_MANAGER}.__init__", f"{_MANAGER}.load_lora_adapter", f"{_MANAGER}.prepare_lora_batch")
"""What pins: building the layers, loading an adapter, and every batch's index tensors."""


def install() -> None:
    """Run the three hooked methods without pinning."""
    for target in HOOKED:
        HookRegistry.register(target, without_pinning, HookType.AROUND)
    HookRegistry.apply_hooks()


def without_pinning(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `original` where asking for pinned memory means nothing."""
    with _Unpinned():
        return original(*args, **kwargs)


class _Unpinned(TorchFunctionMode):  # type: ignore[misc]
    """Drops `pin_memory=` from every torch call and makes `Tensor.pin_memory()` return the tensor itself."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        del types
        if func is torch.Tensor.pin_memory:
            return args[0]
        return func(*args, **{key: value for key, value in (kwargs or {}).items() if key != "pin_memory"})
