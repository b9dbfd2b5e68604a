"""Which base to merge into: the candidates are written, measured from disk beside the trained model, the best one kept.

The one merged into the original weights lacks the error that packing made and the adapter was trained around; the other
has exactly it, rounded to 16 bits. Which is nearer depends on the model, so both are tried where they fit.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from tuneship.core import checkpoint
from tuneship.core.hardware import gib
from tuneship.core.parity import Parity, ReferenceRow
from tuneship.core.progress import say
from tuneship.core.recipe import Recipe
from tuneship.core.shape import Shape
from tuneship.train import model, parity
from tuneship.train.merging import merge
from tuneship.train.merging.merge import Onto, Trained
from tuneship.train.parity import Comparison, Name

_USABLE = 0.9
"""Of the memory that is free; the rest is fragments."""


class Kept(NamedTuple):
    """The candidate that lies in the folder. `deferred` says why nothing was measured, or is empty."""

    onto: Onto
    measured: dict[Onto, Comparison]
    deferred: str = ""

    @property
    def nlls(self) -> dict[str, float]:
        """Held-out NLL of each candidate that was measured."""
        return {onto: measured.nll for onto, measured in self.measured.items()}

    def judge(self, reference: str, rows: int, limit: float) -> Parity:
        """The verdict on the one that was kept."""
        verdict = parity.judge(
            self.measured[self.onto], rows, reference=reference, candidate=f"merged ({self.onto})", limit=limit
        )
        return verdict.model_copy(update={"merged_into": self.onto, "candidates": self.nlls})


class Text(NamedTuple):
    """A tokenizer, the ids at which answers end, and a padding id."""

    tokenizer: Any
    ends: tuple[int, ...]
    pad_id: int


def make(
    recipe: Recipe, trained: Trained, packed_base: Path, text: Text, reference: Sequence[ReferenceRow], out: Path
) -> Kept:
    """Write the recipe's candidates and leave the better one in `out`, which is empty.

    Args:
        recipe: says which candidates.
        trained: the adapter and its 16-bit base.
        packed_base: the base as training loads it: the same folder, or one that is packed on disk.
        text: how text is made and ends.
        reference: held-out rows; without any, nothing is measured.
        out: of the checkpoint.

    """
    wanted = _wanted(recipe)
    deferred = _does_not_fit(recipe, trained, reference) if reference else ""
    if deferred or not reference:
        (out_of_one,) = wanted[:1]
        merge.write_merged(trained, out_of_one, text.tokenizer, text.ends, recipe.model, out)
        return Kept(out_of_one, {}, deferred)
    for onto in wanted:
        say(f"merging into the {onto} base")
        (out / onto).mkdir()
        merge.write_merged(trained, onto, text.tokenizer, text.ends, recipe.model, out / onto)
    try:
        measured = measure(recipe, trained, packed_base, {onto: out / onto for onto in wanted}, reference, text.pad_id)
        kept = Kept(min(wanted, key=lambda onto: measured[onto].nll), measured)
    except torch.OutOfMemoryError:
        kept = Kept(wanted[0], {}, "the GPU's memory ran out")
    for file in (out / kept.onto).iterdir():
        file.rename(out / file.name)
    for onto in wanted:
        shutil.rmtree(out / onto)
    return kept


def _wanted(recipe: Recipe) -> tuple[Onto, ...]:
    """The one that is kept when nothing can be measured first."""
    if recipe.merge.base != "auto":
        return (recipe.merge.base,)
    return ("original",) if recipe.quantization.method == "none" else ("original", "dequantized")


def measure(
    recipe: Recipe,
    trained: Trained,
    packed_base: Path,
    folders: Mapping[Name, Path],
    reference: Sequence[ReferenceRow],
    pad_id: int,
) -> dict[Name, Comparison]:
    """All candidates beside the trained model, which then answers once; one at a time where they do not fit."""
    together = not _does_not_fit(recipe, trained, reference, len(folders))
    teacher = model.load_trained(packed_base, trained.adapter, recipe)
    measured: dict[Name, Comparison] = {}
    for group in [list(folders)] if together else [[name] for name in folders]:
        loaded = {name: model.load_base(folders[name], recipe.model) for name in group}
        measured |= parity.compare(teacher, loaded, reference, pad_id)
        del loaded
        _free()
    del teacher
    _free()
    return measured


def _free() -> None:
    """Give back what nobody refers to, also to other processes."""
    gc.collect()
    torch.cuda.empty_cache()


def _does_not_fit(recipe: Recipe, trained: Trained, reference: Sequence[ReferenceRow], candidates: int = 1) -> str:
    """Why the trained model and that many candidates cannot be measured side by side here; empty if they can."""
    shape = Shape.of(checkpoint.read_config(trained.base))
    candidate = merge.merged_bytes(trained.base, recipe.model)
    packed = recipe.quantization.method != "none"
    teacher = int(shape.linear_parameters * 0.53 + shape.embedding_parameters * 2) if packed else candidate
    needed = candidates * candidate + teacher + parity.workspace_bytes(reference, shape.vocab)
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    if needed <= free * _USABLE:
        return ""
    return f"trained and merged model take about {gib(needed)} side by side, {gib(free)} are free"
