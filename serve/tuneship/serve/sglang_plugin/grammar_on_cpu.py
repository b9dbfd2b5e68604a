"""JSON schemas, and tools that must be called, on a CPU.

Upstream gaps, 0.5.17: SGLang puts xgrammar's token mask in pinned memory without asking whether there is any, and has
no way to lay it over logits that are not on an accelerator. The first request with a schema ends the engine. xgrammar
itself masks on CPUs, in any dtype. 0.5.23 does both: this module goes with the last version before it, and
`tests/unit/serve/test_plugin.py` then fails.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from tuneship.serve.sglang_plugin.pinned_memory import without_pinning

_BACKEND = "sglang.srt.constrained.xgrammar_backend"


def install() -> None:
    """Mask with xgrammar's own kernel, from plain memory."""
    HookRegistry.register(f"{_BACKEND}._allocate_token_bitmask", without_pinning, HookType.AROUND)
    HookRegistry.register(f"{_BACKEND}.XGrammarGrammar.apply_vocab_mask", mask, HookType.REPLACE)
    HookRegistry.apply_hooks()


def mask(_grammar: Any, logits: torch.Tensor, vocab_mask: torch.Tensor) -> None:
    """Set `logits` (batch, vocabulary) to -inf in place where the bit in `vocab_mask` (batch, words) is 0."""
    from xgrammar import apply_token_bitmask_inplace  # noqa: PLC0415 - with the first request that wants it

    apply_token_bitmask_inplace(logits, vocab_mask)
