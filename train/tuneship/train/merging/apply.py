"""Do what a merge plan says, tensor by tensor: the sum in float32, rounded once.

Memory is what one tensor takes and the pages of one mapped shard of the base, whatever the model's size. On a GPU the
tensor is merged there: NF4 packs there as training packed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tuneship.core.errors import ArtifactError
from tuneship.core.progress import progress
from tuneship.core.tensor_file import Slot
from tuneship.train.merging import four_bit, shards
from tuneship.train.merging.changes import Change, Delta, Plan
from tuneship.train.merging.shards import DTYPES, Tensors

_PIECE = 1 << 24
"""Values of a weight that are in float32 at a time."""


class Packing(NamedTuple):
    """How the base was packed while training: which weights, as nf4 or fp4, from which dtype, its scales too or not."""

    keys: frozenset[str]
    kind: str
    dtype: torch.dtype
    double: bool


def apply(
    plan: Plan,
    base: Tensors,
    adapter: Tensors,
    out: Path,
    dtype: torch.dtype,
    device: torch.device,
    packing: Packing | None,
) -> None:
    """Write the merged checkpoint's tensors into `out`, floats in `dtype`.

    With `packing`, the adapter is added to what those weights are after packing; else to the base as it is.

    Raises:
        ArtifactError: a merged weight is not finite, or the base has tensors of a kind that cannot be merged.

    """
    changes = _in_reading_order(plan, base)
    slots = {key: written_as(base.slots[change.source], dtype) for key, change in changes.items()}

    def tensors() -> Iterator[Tensor]:
        for done, (key, change) in enumerate(changes.items(), start=1):
            packed = packing if packing and key in packing.keys else None
            yield _one(key, change, base, adapter, dtype, device, packed)
            progress("merge", done, len(changes))

    shards.write(out, slots, tensors())


def _in_reading_order(plan: Plan, base: Tensors) -> dict[str, Change]:
    """Every tensor that is written, those of one file of the base together."""
    everything = {key: Change(key) for key in base.slots} | plan.changes
    place = {key: number for number, key in enumerate(base.slots)}
    return dict(sorted(everything.items(), key=lambda item: place[item[1].source]))


def written_as(slot: Slot, dtype: torch.dtype) -> Slot:
    """Floats as `dtype`; what counts stays what it is."""
    return Slot(DTYPES[dtype], slot.shape) if slot.dtype in DTYPES.values() else slot


def _one(
    key: str,
    change: Change,
    base: Tensors,
    adapter: Tensors,
    dtype: torch.dtype,
    device: torch.device,
    packing: Packing | None,
) -> Tensor:
    if change.replaced:
        return adapter.get(change.replaced).to(dtype)
    weight = base.get(change.source)
    if packing:
        weight = four_bit.there_and_back(weight.to(device, packing.dtype), packing.kind, double=packing.double)
    if change.delta:
        return _added(key, weight.to(device), change.delta, adapter, dtype)
    return weight.to(dtype) if weight.dtype in DTYPES else weight


def _added(key: str, weight: Tensor, delta: Delta, adapter: Tensors, dtype: torch.dtype) -> Tensor:
    """`weight` (rows, columns) + scaling B A, piece by piece in float32, as `dtype`."""
    a, b = (adapter.get(half).to(weight.device, torch.float32) for half in (delta.a, delta.b))
    left, right = (a.T, b.T) if delta.transposed else (b, a)
    magnitude = adapter.get(delta.magnitude).to(weight.device, torch.float32) if delta.magnitude else None
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    rows = max(_PIECE // weight.shape[1], 1)
    for start in range(0, weight.shape[0], rows):
        piece = slice(start, start + rows)
        total = weight[piece].float() + (left[piece] @ right) * delta.scaling
        if magnitude is not None:
            total *= (magnitude[piece] / torch.linalg.norm(total, dim=1))[:, None]
        out[piece] = total
        if not torch.isfinite(out[piece]).all():
            raise ArtifactError(
                f"merging gives NaN or infinity in {key}",
                hint="merge with model.dtype = 'bfloat16', or train anew: `tuneship up RECIPE --from train`",
            )
    return out
