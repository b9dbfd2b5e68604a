"""Evaluation tasks: rows of chats whose last message is the reference answer, and scorers from answer to 0..1.

rows = read_rows("invoice.heldout.jsonl", limit=200)
score = find_scorer("json-fields")(answer, rows[0].reference, rows[0].extra)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tuneship.bench.quality.tasks import own
from tuneship.bench.quality.tasks.choice import score_choice
from tuneship.bench.quality.tasks.exact import score_exact
from tuneship.bench.quality.tasks.json_fields import score_json_fields
from tuneship.bench.quality.tasks.json_schema import score_json_schema
from tuneship.bench.quality.tasks.normalised import score_normalised
from tuneship.bench.quality.tasks.numeric import score_numeric
from tuneship.bench.quality.tasks.pattern import score_regex
from tuneship.bench.quality.tasks.rouge import score_rouge_l
from tuneship.bench.quality.tasks.rows import Row, read_rows
from tuneship.bench.quality.tasks.sql import score_sql
from tuneship.core.errors import DataError

Scorer = Callable[[str, str, Mapping[str, Any]], float]
"""(answer, reference, the row's extra keys over the task's options) -> 0..1.

Raises ValueError when the reference itself cannot be scored.
"""

SCORERS: dict[str, Scorer] = {
    "exact": score_exact,
    "normalised": score_normalised,
    "choice": score_choice,
    "regex": score_regex,
    "numeric": score_numeric,
    "rouge-l": score_rouge_l,
    "json-fields": score_json_fields,
    "json-schema": score_json_schema,
    "sql": score_sql,
}


def find_scorer(name: str) -> Scorer:
    """The scorer called `name`, or the function that `python:FILE.py:function` names.

    Raises:
        DataError: there is none.

    """
    if name.startswith(own.PREFIX):
        return own.load_own(name)
    if name not in SCORERS:
        raise DataError(f"no task {name!r}", hint=f"there are: {', '.join(SCORERS)}, {own.PREFIX}FILE.py:function")
    return SCORERS[name]


__all__ = ["SCORERS", "Row", "Scorer", "find_scorer", "read_rows"]
