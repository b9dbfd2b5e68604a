"""A pre-quantized 4-bit checkpoint on a CPU.

Upstream gaps, 0.5.17 to 0.5.23: SGLang puts the scales of 4-bit weights on "cuda" whatever the engine's device is
(`BitsAndBytesModelLoader`); it registers its 4-bit product, `sglang::apply_bnb_4bit`, for CUDA alone; and around that
product it computes in bfloat16 and takes a packed weight to be one of 16 bits, so that float32, in which equality with
another implementation can be shown, does not load. bitsandbytes itself computes on CPUs, in any dtype. Mended when
`tests/unit/serve/test_plugin.py` fails and an NF4 base starts without this module.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

HOOKED = "sglang.srt.model_loader.loader.BitsAndBytesModelLoader.load_model"
_LAYERS = "sglang.srt.layers.quantization.bitsandbytes"
_VALUES_A_BYTE = 2


def install() -> None:
    """Wait for the first 4-bit checkpoint: importing bitsandbytes is a second that no other engine shall pay."""
    HookRegistry.register(HOOKED, _prepare, HookType.BEFORE)
    HookRegistry.apply_hooks()


def _prepare(*_args: Any, **_kwargs: Any) -> None:
    HookRegistry.register("bitsandbytes.functional.QuantState.from_dict", on_cpu, HookType.BEFORE)
    HookRegistry.register(f"{_LAYERS}.calculate_quant_ratio", values_a_byte, HookType.REPLACE)
    HookRegistry.register(f"{_LAYERS}.BitsAndBytesLinearMethod._apply_4bit_weight", multiply, HookType.REPLACE)
    HookRegistry.apply_hooks()


def on_cpu(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`QuantState.from_dict(quant_state, device="cuda")` with the device that there is."""
    return args, {**kwargs, "device": "cpu"}


def values_a_byte(_dtype: torch.dtype) -> int:
    """How many 4-bit values a byte holds; what they are computed in does not matter."""
    return _VALUES_A_BYTE


def multiply(_method: Any, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x` (..., in) times the layers packed one after the other in `layer.weight` (bytes, 1): (..., sum of widths).

    Layer i lies at `offsets[i]:offsets[i + 1]`; its scales, shape (out, in) and type are `bnb_quant_state[i]`.
    """
    from bitsandbytes import matmul_4bit  # noqa: PLC0415 - see `install`

    states, offsets = layer.weight.bnb_quant_state, layer.weight.bnb_shard_offsets.tolist()
    parts = [matmul_4bit(x, layer.weight[offsets[i] : offsets[i + 1]].t(), states[i]) for i in range(len(states))]
    product = torch.cat(parts, dim=-1)
    return product if bias is None else product + bias
