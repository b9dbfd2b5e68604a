"""A tokenizer's longest input as a number that JSON can hold.

Upstream gap: transformers says 10^30 for a tokenizer that names no `model_max_length`, `/v1/tokenize` (0.5.17) puts it
into its answer, and its JSON encoder refuses an integer of more than 64 bits: status 500. When the gap is mended,
`tests/unit/serve/test_plugin.py` fails and says so.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

HOOKED = "sglang.srt.utils.hf_transformers.tokenizer.get_tokenizer"
LONGEST = 2**53 - 1
"""What every JSON reader takes as it is."""


def install() -> None:
    """Bound what a tokenizer says of itself."""
    HookRegistry.register(HOOKED, bound, HookType.AFTER)
    HookRegistry.apply_hooks()


def bound(tokenizer: Any, *_: Any, **__: Any) -> Any:
    """The tokenizer, with a `model_max_length` of at most `LONGEST`."""
    if getattr(tokenizer, "model_max_length", 0) > LONGEST:
        tokenizer.model_max_length = LONGEST
    return tokenizer
