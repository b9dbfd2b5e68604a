"""One checkpoint out of base and adapter, in the memory that one shard of it takes, never the whole model.

The adapter was trained on dequant(NF4(W)). It can be merged into W, the original, or into what it was trained on; which
of the two is nearer to the trained model is measured (`candidates.py`), from disk.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers import AutoConfig, GenerationConfig

from tuneship.core import checkpoint
from tuneship.core.errors import ArtifactError, ParityError
from tuneship.core.parity import Parity, ReferenceRow
from tuneship.core.recipe import Model
from tuneship.train.merging import apply, changes, shards, skeleton
from tuneship.train.merging.apply import Packing
from tuneship.train.merging.shards import Tensors
from tuneship.train.model import device, pick_dtype

Onto = Literal["original", "dequantized"]


class Trained(NamedTuple):
    """An adapter, the 16-bit base under it, and how that was packed: `kind` is nf4, fp4 or none, `dtype` from what."""

    base: Path
    adapter: Path
    kind: str
    dtype: torch.dtype
    double: bool


def write_merged(trained: Trained, onto: Onto, tokenizer: Any, ends: tuple[int, ...], model: Model, out: Path) -> None:
    """Merge into the original weights or the dequantized ones, and save a complete HF checkpoint into `out`.

    The generation config keeps the base's defaults and stops at `ends`.

    Raises:
        ArtifactError: the adapter holds something that merging does not know, or does not fit the base.

    """
    if checkpoint.read_config(trained.base).get("quantization_config"):
        raise ArtifactError(f"{trained.base.name} is quantized: there are no 16-bit weights to merge into")
    dtype = pick_dtype(model.dtype)
    names = skeleton.read(trained.base, model)
    base, adapter = shards.of_checkpoint(trained.base), Tensors([trained.adapter / "adapter_model.safetensors"])
    settings = json.loads((trained.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    plan = changes.plan(base.shapes, adapter.shapes, settings, names)
    packing = None
    if onto == "dequantized":
        packing = Packing(names.packed, trained.kind, trained.dtype, trained.double)
        _require(packing.keys, base)
    apply.apply(plan, base, adapter, out, dtype, device(), packing)
    write_settings(trained.base, model, tokenizer, ends, out, tied=names.tied and not plan.untied)


def write_settings(base: Path, model: Model, tokenizer: Any, ends: tuple[int, ...], out: Path, *, tied: bool) -> None:
    """All of a checkpoint but its weights, in `out`."""
    _write_config(base, model, pick_dtype(model.dtype), out, tied=tied)
    _generation_config(base, tokenizer, ends).save_pretrained(out)
    tokenizer.save_pretrained(out)


def merged_bytes(base: Path, model: Model) -> int:
    """What a merged checkpoint's weights will take."""
    dtype = pick_dtype(model.dtype)
    return sum(apply.written_as(slot, dtype).size for slot in shards.of_checkpoint(base).slots.values())


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


def _require(keys: frozenset[str], base: Tensors) -> None:
    missing = sorted(keys - base.slots.keys())
    if missing:
        raise ArtifactError(
            f"the base's checkpoint names its tensors in another way than its model: it has no {missing[0]}",
            hint="--merge.base original",
        )


def _write_config(base: Path, model: Model, dtype: torch.dtype, out: Path, *, tied: bool) -> None:
    config = AutoConfig.from_pretrained(base, trust_remote_code=model.trust_remote_code)
    config.dtype = dtype
    config.use_cache = True
    config.tie_word_embeddings = tied
    config.save_pretrained(out)
    if getattr(config, "auto_map", None):  # a model that brings code of its own keeps it
        for code in base.glob("*.py"):
            shutil.copyfile(code, out / code.name)


def _generation_config(base_path: Path, tokenizer: Any, end_token_ids: tuple[int, ...]) -> GenerationConfig:
    try:
        config = GenerationConfig.from_pretrained(base_path)
    except OSError:
        config = GenerationConfig()
    config.eos_token_id = list(end_token_ids)
    config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end_token_ids[0]
    return config
