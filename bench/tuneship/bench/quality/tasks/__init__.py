"""Evaluation tasks: rows of chats whose last message is the reference answer, and scorers from answer to 0..1.

rows = read_rows("invoice.heldout.jsonl", limit=200)
score = SCORERS["json-fields"](answer, rows[0].reference, rows[0].extra)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tuneship.bench.quality.tasks.exact import score_exact
from tuneship.bench.quality.tasks.json_fields import score_json_fields
from tuneship.bench.quality.tasks.rows import Row, read_rows
from tuneship.bench.quality.tasks.sql import score_sql

Scorer = Callable[[str, str, Mapping[str, Any]], float]
"""(answer, reference, the row's extra keys) -> 0..1. Raises ValueError when the reference itself cannot be scored."""

SCORERS: dict[str, Scorer] = {"exact": score_exact, "json-fields": score_json_fields, "sql": score_sql}

__all__ = ["SCORERS", "Row", "Scorer", "read_rows"]
