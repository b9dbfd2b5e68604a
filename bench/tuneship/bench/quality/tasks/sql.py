"""`sql`: the answer is right when it selects what the reference selects.

The row's `schema` key is an SQL script that makes and fills a database. Both statements run on it in SQLite, in memory,
read-only: an authorizer refuses everything but reading tables and calling functions (no ATTACH, PRAGMA, writing or
extensions), a progress handler ends what takes too long, and limits bound values and rows. Results are compared as
multisets of rows, or in order when the reference has an ORDER BY of its own.
"""

from __future__ import annotations

import re
import sqlite3
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from typing import Any

from tuneship.bench.quality.tasks.text import unfence

_TIME_LIMIT_S = 1.0
_ROW_LIMIT = 10_000
_LENGTH_LIMIT = 100_000  # bytes of one string or blob: keeps `zeroblob(1e9)` and runaway joins out of memory
_STEPS_BETWEEN_CHECKS = 1_000
_ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
# Possessive, or a row of comments could be split in exponentially many ways.
_IS_SELECT = re.compile(r"\A(?:\s|--[^\n]*\n|/\*.*?\*/)*+(?:select|with)\b", re.IGNORECASE | re.DOTALL)
_QUOTED = re.compile(r"""'(?:[^']|'')*'|"(?:[^"]|"")*"|--[^\n]*|/\*.*?\*/""", re.DOTALL)
_INNERMOST_PARENTHESES = re.compile(r"\([^()]*\)")
_ORDER_BY = re.compile(r"\border\s+by\b", re.IGNORECASE)

Rows = list[tuple[Any, ...]]


def score_sql(answer: str, reference: str, extra: Mapping[str, Any]) -> float:
    """1.0 when `answer` is a single SELECT with the reference's result, else 0.0.

    Raises:
        ValueError: the row has no `schema`, the schema does not run, or the reference does not.

    """
    schema = str(extra.get("schema") or "")
    if not schema:
        raise ValueError("the row has no key 'schema' with an SQL script")
    with closing(_database(schema)) as connection:
        try:
            wanted = _select(connection, reference)
        except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
            raise ValueError(f"the reference does not run: {error}") from None
        try:
            found = _select(connection, unfence(answer))
        except (sqlite3.Error, sqlite3.Warning, ValueError, MemoryError):
            return 0.0
    if has_order(reference):
        return float(found == wanted)
    return float(Counter(found) == Counter(wanted))


def has_order(statement: str) -> bool:
    """Whether the outermost SELECT is ordered (an ORDER BY in a subquery or window does not order the result)."""
    text = _QUOTED.sub(" ", statement)
    while (inner := _INNERMOST_PARENTHESES.sub(" ", text)) != text:
        text = inner
    return bool(_ORDER_BY.search(text))


def _database(schema: str) -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    try:
        connection.executescript(schema)
    except (sqlite3.Error, sqlite3.Warning) as error:
        connection.close()
        raise ValueError(f"the schema does not run: {error}") from None
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LENGTH_LIMIT)
    connection.set_authorizer(_authorize)
    return connection


def _authorize(action: int, *_details: str | None) -> int:
    return sqlite3.SQLITE_OK if action in _ALLOWED else sqlite3.SQLITE_DENY


def _select(connection: sqlite3.Connection, statement: str) -> Rows:
    """The rows of one SELECT, numbers rounded to nine digits so that the order of a sum does not matter."""
    if not _IS_SELECT.match(statement):
        raise ValueError("not a SELECT")
    deadline = time.monotonic() + _TIME_LIMIT_S
    connection.set_progress_handler(lambda: time.monotonic() > deadline, _STEPS_BETWEEN_CHECKS)
    with closing(connection.execute(statement)) as cursor:
        rows = cursor.fetchmany(_ROW_LIMIT + 1)
    if len(rows) > _ROW_LIMIT:
        raise ValueError(f"more than {_ROW_LIMIT} rows")
    return [tuple(_rounded(value) for value in row) for row in rows]


def _rounded(value: Any) -> Any:
    return float(f"{value:.9g}") if isinstance(value, float) else value
