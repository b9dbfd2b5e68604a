"""A short training on a few rows, before the long one on all, has to see the loss fall."""

from __future__ import annotations

import json
import math
from pathlib import Path

from tuneship.core.errors import TrainError
from tuneship.core.progress import say
from tuneship.core.recipe import Recipe
from tuneship.train.data.dataset import Dataset
from tuneship.train.fitting import metrics

_FEWEST = 8
"""Steps from which a fall can be told from noise."""


def subset(dataset: Dataset, count: int) -> Dataset:
    """`count` rows spread evenly over all of them (0: all), since files are often sorted."""
    total = len(dataset.rows)
    if not count or count >= total:
        return dataset
    return dataset._replace(rows=dataset.rows.select([index * total // count for index in range(count)]))


def shortened(recipe: Recipe, all_rows: float, rows: int) -> Recipe:
    """`recipe` with the steps of one pass over `rows`: as many as show a fall, and never more than it has itself.

    Args:
        recipe: the resolved recipe.
        all_rows: those that it would train on, packed as the subset is.
        rows: those of the subset, packed where it packs.

    """
    train = recipe.train
    own = train.steps or math.ceil(train.epochs * all_rows / train.effective_batch)
    once = math.ceil(rows / train.effective_batch)
    steps = min(own, max(once, _FEWEST))
    return recipe.model_copy(update={"train": train.model_copy(update={"steps": steps})})


def require_fall(attempt: Path) -> None:
    """See the mean loss of the last quarter of the steps below that of the first.

    Raises:
        TrainError: it is not, or there were too few steps to tell.

    """
    lines = (attempt / metrics.FILE).read_text(encoding="utf-8").splitlines()
    losses = [float(json.loads(line)["loss"]) for line in lines]
    if len(losses) < _FEWEST:
        raise TrainError(
            f"{len(losses)} steps are too few to see a loss fall",
            hint=f"the recipe has no more: --train.steps {_FEWEST}, or more",
        )
    quarter = len(losses) // 4
    first, last = sum(losses[:quarter]) / quarter, sum(losses[-quarter:]) / quarter
    if last >= first:
        raise TrainError(
            f"the loss did not fall: {first:.3f} in the first {quarter} steps, {last:.3f} in the last",
            hint="look at what is learnt (tuneship data show), and at train.learning_rate",
        )
    say(f"smoke: the loss fell from {first:.3f} to {last:.3f} in {len(losses)} steps")
