"""One bf16 checkpoint out of base and adapter, sealed only if it still is the model that was trained.

PEFT merges into a 4-bit base by quantizing again, with only a warning; so the adapter is always merged into a 16-bit
base. The candidate is saved, loaded again from disk, and that is what parity is measured on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import GenerationConfig

from tuneship.core.errors import ParityError
from tuneship.core.parity import Parity, ReferenceRow
from tuneship.core.recipe import Model
from tuneship.train.model import load_base

_SHARD = "5GB"


def write_merged(
    base_path: Path, adapter: Path, tokenizer: Any, end_token_ids: tuple[int, ...], model: Model, out: Path
) -> None:
    """Merge `adapter` into the original 16-bit base and save a complete HF checkpoint into `out`.

    The generation config keeps the base's defaults and stops at `end_token_ids`.
    """
    wrapped = PeftModel.from_pretrained(load_base(base_path, model), adapter)
    merged = wrapped.merge_and_unload(safe_merge=True)
    merged.config.use_cache = True
    merged.generation_config = _generation_config(base_path, tokenizer, end_token_ids)
    merged.save_pretrained(out, max_shard_size=_SHARD)
    tokenizer.save_pretrained(out)


def require(parity: Parity, *, force: bool) -> Parity:
    """Let a passed parity through; a failed one only with `force`, and recorded so.

    Raises:
        ParityError: the merged model is worse than the trained one by more than the limit.

    """
    if parity.passed:
        return parity
    if force:
        return parity.model_copy(update={"forced": True})
    raise ParityError(
        f"the merged model is {parity.nll_increase:.4f} nats per token worse than the trained one "
        f"(limit {parity.limit}, over {parity.tokens} held-out tokens)",
        hint="serve the adapter instead (serve.mode = 'adapters'), raise merge.max_nll_increase, or --force",
    )


def with_merged(reference: list[ReferenceRow], merged: list[list[float]]) -> list[ReferenceRow]:
    """The reference rows with the merged model's log-probabilities beside the others."""
    return [row.model_copy(update={"merged": log_p}) for row, log_p in zip(reference, merged, strict=True)]


def _generation_config(base_path: Path, tokenizer: Any, end_token_ids: tuple[int, ...]) -> GenerationConfig:
    try:
        config = GenerationConfig.from_pretrained(base_path)
    except OSError:
        config = GenerationConfig()
    config.eos_token_id = list(end_token_ids)
    config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end_token_ids[0]
    return config
