"""A base with the values that NF4 stands for, by the way of a merge that adds nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tuneship.core import checkpoint
from tuneship.core.errors import ArtifactError
from tuneship.core.recipe import Model
from tuneship.train.merging import apply, merge, shards, skeleton
from tuneship.train.merging.apply import Packing
from tuneship.train.merging.changes import Plan
from tuneship.train.merging.shards import Tensors
from tuneship.train.model import device, pick_dtype


def write(base: Path, model: Model, tokenizer: Any, out: Path, *, double: bool) -> None:
    """A complete HF checkpoint in `out`, all in `model.dtype`: packed from it, unpacked to it, tensor by tensor.

    Raises:
        ArtifactError: transformers does not know the model, or the checkpoint names its tensors in another way.

    """
    dtype = pick_dtype(model.dtype)
    names, weights = skeleton.read(base, model), shards.of_checkpoint(base)
    missing = sorted(names.packed - weights.slots.keys())
    if missing:
        raise ArtifactError(
            f"the checkpoint of {model.id} names its tensors in another way than its model: it has no {missing[0]}",
            hint="--quantization nf4 packs what transformers loads",
        )
    packing = Packing(names.packed, "nf4", dtype, double)
    apply.apply(Plan(changes={}, untied=False), weights, Tensors([]), out, dtype, device(), packing)
    merge.write_settings(base, model, tokenizer, tuple(checkpoint.end_token_ids(base)), out, tied=names.tied)
