"""A step with adapters starts the GPU's programs for its own tokens, not for the most that any step can have.

Upstream gap: in a CUDA graph SGLang launches its kernels for adapters over every chunk of tokens that the largest graph
can hold (`kernels/ops/gemm/chunked_sgmv_*.py`, 0.5.17): 521 of them for 8,192 tokens and 9 slots, where 7 tokens fill
one. Each program finds that it has nothing to do, and 146,000 of those took 89 microseconds of an H200, 28 times in a
step. When the grid follows from the tokens of a graph, `tests/unit/serve/test_plugin_adapters.py` fails and says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

_BACKEND = "sglang.srt.lora.backend.chunked_backend"
HOOKED = (f"{_BACKEND}.chunked_sgmv_lora_shrink_forward", f"{_BACKEND}.chunked_sgmv_lora_expand_forward")
_CHUNK = 16
"""Tokens of the smallest chunk: larger ones are fewer."""


def install() -> None:
    """Launch both kernels for no more segments than their tokens can be cut into."""
    for target in HOOKED:
        HookRegistry.register(target, narrowed, HookType.AROUND)
    HookRegistry.apply_hooks()


def narrowed(
    original: Callable[..., torch.Tensor], x: torch.Tensor, weights: torch.Tensor, batch_info: Any, **more: Any
) -> torch.Tensor:
    """`original`, which takes the length of `weight_indices` for the number of segments when it is captured."""
    if batch_info.use_cuda_graph:
        indices = batch_info.weight_indices[: most(len(x), len(batch_info.lora_ranks))]
        batch_info = dataclasses.replace(batch_info, weight_indices=indices)
    return original(x=x, weights=weights, batch_info=batch_info, **more)


def most(tokens: int, slots: int) -> int:
    """Chunks of tokens that are sorted by slot, at most: none is empty, and all but the last of each slot are full."""
    return min(tokens, tokens // _CHUNK + slots)
