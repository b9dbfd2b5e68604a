"""Everything before a model is loaded: tokenizer, template, rows, plan. Imports no torch of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from tuneship.core import checkpoint, hardware, model_source
from tuneship.core.model_source import ModelSource
from tuneship.core.recipe import Recipe
from tuneship.core.shape import Shape
from tuneship.train.data import dataset
from tuneship.train.data.dataset import Dataset
from tuneship.train.data.template import ChatTemplate, end_token_ids
from tuneship.train.planning import calibration
from tuneship.train.planning import plan as planner
from tuneship.train.planning.plan import Plan


class Prepared(NamedTuple):
    """A base and how its text is made; `end_ids` are where generation must stop, the end of turn first."""

    source: ModelSource
    tokenizer: Any
    template: ChatTemplate
    end_ids: tuple[int, ...]

    @property
    def pad_id(self) -> int:
        """A padding id; the end of turn where the tokenizer has none (labels, not ids, decide the loss)."""
        pad: int | None = self.tokenizer.pad_token_id
        return self.end_ids[0] if pad is None else pad


class Rows(NamedTuple):
    """The encoded splits."""

    train: Dataset
    heldout: Dataset | None


def prepare(recipe: Recipe) -> Prepared:
    """Tokenizer and template of the recipe's base, which must be on this disk."""
    from transformers import AutoTokenizer  # noqa: PLC0415 - seconds, and only where rows are read

    source = model_source.resolve(recipe.model.id, recipe.model.revision)
    tokenizer = AutoTokenizer.from_pretrained(source.path, trust_remote_code=recipe.model.trust_remote_code)
    template = ChatTemplate(tokenizer, recipe.data.template)
    return Prepared(source, tokenizer, template, end_token_ids(template, checkpoint.end_token_ids(source.path)))


def read_rows(recipe: Recipe, template: ChatTemplate, folder: Path | None = None) -> Rows:
    """Both splits, checked and encoded; they lie on the disk of `folder`, or where temporary files are."""
    data = recipe.data
    train = dataset.load(data.train, data, template, folder)
    heldout = dataset.load(data.heldout, data, template, folder) if data.heldout else None
    return Rows(train, heldout)


def plan(recipe: Recipe, source: ModelSource, rows: Dataset) -> Plan:
    """How training on `rows` fits this machine."""
    return plan_for(recipe, source, rows=len(rows.rows), tokens=rows.tokens, longest=rows.longest)


def plan_for(recipe: Recipe, source: ModelSource, *, rows: int, tokens: int, longest: int) -> Plan:
    """How training on that many rows fits this machine, by what a probe measured where there was one."""
    shape, machine = Shape.of(checkpoint.read_config(source.path)), hardware.detect()
    measured = calibration.find(recipe, shape, longest) if machine.gpus else None
    return planner.make(recipe, shape, machine, rows=rows, tokens=tokens, longest=longest, measured=measured)
