"""The example data: made by its generator byte for byte, right in every row, and held out for real."""

from __future__ import annotations

import itertools
import json
import re
import sqlite3
import subprocess
import sys
from collections import Counter
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).parents[2] / "recipes" / "data"
TASKS = ("invoice-json", "triage", "sql")
SPLITS = {"train": 640, "heldout": 200}

Row = dict[str, Any]


@cache
def rows(task: str, split: str) -> list[Row]:
    lines = (DATA / f"{task}.{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def both(task: str) -> list[Row]:
    return [*rows(task, "train"), *rows(task, "heldout")]


def question(row: Row) -> str:
    return str(row["messages"][1]["content"])


def answer(row: Row) -> str:
    return str(row["messages"][2]["content"])


def test_the_generator_writes_what_is_committed(tmp_path: Path):
    subprocess.run([sys.executable, "-B", DATA / "generate.py", "--out", tmp_path], check=True)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert made == {path.name: path.read_bytes() for path in DATA.glob("*.jsonl")}
    assert set(made) == {f"{task}.{split}.jsonl" for task in TASKS for split in SPLITS}


@pytest.mark.parametrize(("task", "split"), list(itertools.product(TASKS, SPLITS)))
def test_rows_are_chats_of_one_question(task: str, split: str):
    found = rows(task, split)
    assert len(found) == SPLITS[split]
    assert len({question(row) for row in found}) == len(found)
    assert all([message["role"] for message in row["messages"]] == ["system", "user", "assistant"] for row in found)
    assert len({row["messages"][0]["content"] for row in both(task)}) == 1
    assert all("{" not in question(row) and "\n" not in answer(row) for row in found)


def seen(task: str, split: str, key: str) -> set[str]:
    """All template ids or values of a split; a triage row has two templates."""
    found = (row[key].split() if isinstance(row[key], str) else row[key] for row in rows(task, split))
    return set(itertools.chain.from_iterable(found))


@pytest.mark.parametrize("key", ["template", "values"])
@pytest.mark.parametrize("task", TASKS)
def test_held_out_rows_share_no_template_and_no_value_with_train(task: str, key: str):
    train, heldout = seen(task, "train", key), seen(task, "heldout", key)
    assert len(train) >= 24
    assert len(heldout) >= 10
    assert train & heldout == set()


def pattern(row: Row) -> str:
    """The question with everything variable blanked: names, numbers, currencies, dates."""
    text = question(row).rpartition("\n")[2]
    for value in row["values"]:
        text = re.sub(rf"\b{re.escape(value)}\b", "_", text, flags=re.IGNORECASE)
    text = re.sub(r"\b(?:[A-Z][a-z]+ \d+, \d{4}|\d+ [A-Z][a-z]+ \d{4})\b", "_", text)
    currency = "EUR|USD|GBP|CHF|SEK|JPY|euros|dollars|pounds|Swiss francs|francs|Swedish kronor|kronor|yen"
    return re.sub(rf"[€$£¥\d.,-]+|\b(?:{currency})\b|\s+", " ", text).strip()


@pytest.mark.parametrize("task", TASKS)
def test_held_out_sentences_are_other_sentences(task: str):
    """Seen from the text alone, without trusting the generator's ids."""
    train, heldout = ({pattern(row) for row in rows(task, split)} for split in SPLITS)
    assert train & heldout == set()


@pytest.mark.parametrize("task", TASKS)
def test_values_stand_in_the_text(task: str):
    for row in both(task):
        text = f"{question(row)} {answer(row)}".lower()
        assert row["values"] or task == "triage"
        assert all(value.lower() in text for value in row["values"])


def test_an_invoices_fields_can_be_read_off_its_text():
    for row in both("invoice-json"):
        text, fields = question(row), json.loads(answer(row))
        assert list(fields) == ["vendor", "total", "currency", "due"]
        assert fields["vendor"].lower() in text.lower()
        written = re.search(r'"total":([\d.]+)', answer(row))
        assert written
        assert written[1] in text.replace(",", "")
        due = date.fromisoformat(fields["due"])
        assert due.isoformat() in text or (str(due.year) in text and f"{due:%B}" in text and str(due.day) in text)
        form = r'\{"vendor":"[A-Za-z ]+","total":\d+(\.\d\d)?,"currency":"[A-Z]{3}","due":"[\d-]{10}"\}'
        assert re.fullmatch(form, answer(row))


CURRENCIES = {
    "EUR": "€|EUR|euros",
    "USD": r"\$|USD|dollars",
    "GBP": "£|GBP|pounds",
    "CHF": "CHF|francs",
    "SEK": "SEK|kronor",
    "JPY": "¥|JPY|yen",
}


def test_an_invoice_names_exactly_its_currency():
    found = Counter()
    for row in both("invoice-json"):
        currency = json.loads(answer(row))["currency"]
        found[currency] += 1
        assert [code for code, words in CURRENCIES.items() if re.search(words, question(row))] == [currency]
    assert set(found) == set(CURRENCIES)
    assert min(found.values()) > 80


@pytest.mark.parametrize("split", SPLITS)
def test_triage_has_every_label_and_every_priority(split: str):
    found = rows("triage", split)
    matches = [re.fullmatch(r"label=([a-z]+) priority=(low|normal|high)", answer(row)) for row in found]
    assert all(matches)
    labels = Counter(match[1] for match in matches if match)
    priorities = Counter(match[2] for match in matches if match)
    assert len(labels) == 12
    assert min(labels.values()) >= len(found) // 40
    assert min(priorities.values()) > len(found) // 5
    assert all(label in found[0]["messages"][0]["content"] for label in labels)


def execute(row: Row, query: str) -> list[tuple[Any, ...]]:
    database = sqlite3.connect(":memory:")
    try:
        database.executescript(row["schema"])
        return database.execute(query).fetchall()
    finally:
        database.close()


@pytest.mark.parametrize("split", SPLITS)
def test_sql_answers_run_and_depend_on_their_condition(split: str):
    for row in rows("sql", split):
        result = execute(row, answer(row))
        assert result
        assert result[0][0] not in {0, None}
        head, where, condition = answer(row).partition(" WHERE ")
        if where:
            assert result != execute(row, head)
            assert result != execute(row, f"{head} WHERE NOT ({condition})")


@pytest.mark.parametrize("split", SPLITS)
def test_sql_questions_show_the_schema_that_is_executed(split: str):
    for row in rows("sql", split):
        shown = re.fullmatch(r"(\w+)\((.*)\)", question(row).splitlines()[0])
        assert shown
        columns = [column[1] for column in execute(row, f"PRAGMA table_info({shown[1]})")]
        assert columns == shown[2].split(", ")
