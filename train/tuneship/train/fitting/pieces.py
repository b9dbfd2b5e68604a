"""A batch in smaller pieces: what a step is cut into when memory runs out.

The loss is a sum over tokens divided by the tokens of the whole step, so the losses and the gradients of the pieces add
up to those of the batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Any]


def rows_in(batch: Batch) -> int:
    """Rows of a padded batch; sequences of a packed one, which is a single row of tokens."""
    return len(_starts(batch)) if "attention_mask" not in batch else len(batch["input_ids"])


def tokens_in(batch: Batch) -> Tensor | int:
    """Tokens without padding; a packed batch has none."""
    mask: Tensor | None = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else mask.sum()


def cut(batch: Batch, size: int) -> Iterator[Batch]:
    """Pieces of at most `size` rows or packed sequences (0: all), without the padding that a piece does not need."""
    if not size or rows_in(batch) <= size:
        yield batch
    elif "attention_mask" in batch:
        for first in range(0, len(batch["input_ids"]), size):
            yield _rows(batch, first, first + size)
    else:
        bounds = [*_starts(batch)[::size], batch["input_ids"].shape[1]]
        for first, last in itertools.pairwise(bounds):
            yield _sequences(batch, first, last)


def _rows(batch: Batch, first: int, last: int) -> Batch:
    """Padding is on the right."""
    longest = int(batch["attention_mask"][first:last].sum(1).max())
    return {key: value[first:last, :longest] if _is_matrix(value) else value for key, value in batch.items()}


def _sequences(batch: Batch, first: int, last: int) -> Batch:
    """What flash-attention is told about boundaries is made anew, as TRL's collator makes it."""
    piece = {key: batch[key][:, first:last] for key in ("input_ids", "labels", "position_ids")}
    edges = [*_starts(piece), last - first]
    if "cu_seq_lens_q" in batch:
        lengths = torch.tensor(edges).diff()
        edge = torch.tensor(edges, dtype=torch.int32, device=piece["input_ids"].device)
        piece |= {"cu_seq_lens_q": edge, "cu_seq_lens_k": edge}
        piece |= dict.fromkeys(("max_length_q", "max_length_k"), int(lengths.max()))
        piece["seq_idx"] = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), lengths)[None].to(
            edge.device
        )
    return piece


def _starts(batch: Batch) -> list[int]:
    return [int(start) for start in (batch["position_ids"][0] == 0).nonzero().flatten()]


def _is_matrix(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2
