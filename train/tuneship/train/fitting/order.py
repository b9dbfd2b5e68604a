"""In which order rows are learnt from: by seed and epoch alone.

The trainer's own samplers draw from the process's random numbers, or begin anew with every one that is built. This
one gives the same rows to the same step however a step is cut, and after a resume.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class Order(Sampler[int]):
    """Indices of all rows, shuffled anew each epoch.

    Args:
        lengths: tokens of each row.
        seed: of the recipe.
        group: 0, or the rows of one step: then a step's rows are of like length, and the longest come first.

    """

    def __init__(self, lengths: ArrayLike, seed: int, group: int = 0) -> None:
        self._lengths = np.asarray(lengths)
        self._seed = seed
        self._group = group
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the dataloader before each epoch, also one that is resumed in its middle."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self._seed << 20) + self._epoch)
        if self._group:
            return iter(get_length_grouped_indices(self._lengths, self._group, generator=generator))
        return map(int, torch.randperm(len(self._lengths), generator=generator).numpy())
