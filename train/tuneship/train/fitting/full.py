"""`train.method = "full"`: every weight learns, and what comes out is a checkpoint, not an adapter.

Weights are trained in float32 (under 16-bit autocast on a GPU), because what a step changes is mostly smaller than a
16-bit weight can tell; the checkpoint is written in the 16 bits in which it is served, and held against the trained
weights like one that was merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tuneship.core import artifact as artifacts
from tuneship.core.files import write_atomic
from tuneship.core.parity import ReferenceRow, write_reference
from tuneship.core.progress import say
from tuneship.core.recipe import Recipe
from tuneship.train import model, parity
from tuneship.train.data.template import Encoded
from tuneship.train.merging import merge
from tuneship.train.prepare import Prepared

_SHARD = "5GB"


class Before:
    """What the base says to held-out rows, asked before it learns."""

    def __init__(self, base: Any, rows: Sequence[Encoded], pad_id: int) -> None:
        self._rows = rows
        self._pad_id = pad_id
        self._base = parity.token_log_p(base, rows, pad_id)

    def reference(self, trained: Any) -> list[ReferenceRow]:
        """Beside what it says now."""
        after = parity.token_log_p(trained, self._rows, self._pad_id)
        return [
            ReferenceRow(
                input_ids=row.input_ids,
                loss_mask=row.loss_mask,
                dtype="float32",
                base=base,
                trained=now,
                messages=list(row.messages) or None,
            )
            for row, base, now in zip(self._rows, self._base, after, strict=True)
        ]


def load_base(path: Path, recipe: Recipe) -> Any:
    """The base as it is trained."""
    return model.load_base(path, recipe.model.model_copy(update={"dtype": "float32"}))


def write(
    trained: Any, prepared: Prepared, recipe: Recipe, reference: list[ReferenceRow], out: Path, *, force: bool
) -> dict[str, float]:
    """Save the checkpoint into `out`, with its evidence; its metrics.

    Raises:
        ParityError: rounding to 16 bits cost more than `merge.max_nll_increase`, and not `force`.

    """
    dtype = model.pick_dtype(recipe.model.dtype)
    state = {name: value.to(dtype) for name, value in trained.state_dict().items()}
    trained.save_pretrained(out, state_dict=state, max_shard_size=_SHARD)
    del state
    tied = bool(trained.config.tie_word_embeddings)
    merge.write_settings(prepared.source.path, recipe.model, prepared.tokenizer, prepared.end_ids, out, tied=tied)
    if not reference:
        say("no held-out data: the checkpoint is not held against the trained weights")
        return {}
    written = model.load_base(out, recipe.model)
    measured = parity.compare(trained, {"checkpoint": written}, reference, prepared.pad_id)["checkpoint"]
    limit = recipe.merge.max_nll_increase
    verdict = parity.judge(
        measured, len(reference), reference="trained in float32", candidate="checkpoint", limit=limit
    )
    verdict = merge.require(verdict, force=force)
    evidence = out / artifacts.EVIDENCE
    write_reference(evidence, merge.with_merged(reference, measured.merged))
    write_atomic(evidence / "parity-1.json", verdict.model_dump_json(indent=1, by_alias=True))
    return {"nll_reference": verdict.nll_reference, "nll": verdict.nll, "kl_mean": verdict.kl_mean}
