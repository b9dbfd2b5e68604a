"""sql: a question over a small schema -> one SELECT, scored by executing it.

The schema stands in the user's message as `table(column, ...)`; a row's `schema` builds and fills the database. Filled
so that the answer is neither empty nor what the same query without its condition would give. Tables,
values and the wording of questions differ between the splits; SQL itself (the twelve forms of QUESTIONS, a LIMIT of 2
to 4) is the closed set that they share.
"""

from __future__ import annotations

import random
import sqlite3
from typing import NamedTuple

from common import Example, Split, Task, names, pick

ROWS = 9


class Table(NamedTuple):
    """A table of two text columns, `name` and `group`, and two of whole numbers, each with its range."""

    table: str
    name: str
    group: str
    groups: tuple[str, ...]
    amount: str
    amounts: range
    other: str
    others: range


TABLES: dict[Split, tuple[Table, ...]] = {
    "train": (
        Table(
            "books", "title", "genre", ("crime", "poetry", "travel"), "price", range(5, 60), "weight", range(90, 900)
        ),
        Table(
            "employees",
            "name",
            "team",
            ("sales", "design", "support"),
            "salary",
            range(1800, 7000),
            "age",
            range(19, 67),
        ),
        Table("orders", "code", "city", ("Leeds", "Turin", "Ghent"), "total", range(10, 950), "discount", range(1, 50)),
        Table(
            "cars",
            "model",
            "color",
            ("red", "blue", "white"),
            "price",
            range(900, 30000),
            "mileage",
            range(8000, 99000),
        ),
        Table(
            "hotels", "name", "town", ("Bern", "Porto", "Cork"), "capacity", range(12, 400), "distance", range(1, 60)
        ),
        Table(
            "films", "title", "country", ("Spain", "Japan", "Chile"), "length", range(70, 190), "budget", range(2, 90)
        ),
        Table("pets", "name", "kind", ("cat", "dog", "rabbit"), "weight", range(2, 45), "age", range(1, 40)),
        Table("plants", "name", "soil", ("sand", "clay", "peat"), "height", range(5, 300), "price", range(2, 60)),
        Table(
            "courses", "title", "level", ("basic", "middle", "expert"), "fee", range(40, 900), "duration", range(2, 60)
        ),
        Table("trains", "code", "line", ("north", "south", "coast"), "speed", range(60, 300), "delay", range(1, 50)),
    ),
    "heldout": (
        Table("songs", "track", "style", ("jazz", "folk", "soul"), "tempo", range(60, 200), "loudness", range(20, 99)),
        Table(
            "ships",
            "vessel",
            "port",
            ("Genoa", "Bergen", "Varna"),
            "tonnage",
            range(900, 9000),
            "draught",
            range(4, 60),
        ),
        Table("meals", "recipe", "menu", ("lunch", "dinner", "brunch"), "cost", range(6, 60), "fat", range(2, 80)),
        Table("lakes", "lake", "region", ("Alps", "Andes", "Urals"), "depth", range(8, 400), "area", range(4, 90)),
        Table("machines", "machine", "hall", ("A1", "B2", "C3"), "power", range(20, 900), "noise", range(30, 110)),
        Table("players", "player", "club", ("Foxes", "Hawks", "Bears"), "score", range(20, 400), "rank", range(1, 60)),
    ),
}


class Question(NamedTuple):
    """A query and the ways to ask for it. Slots are a Table's columns, `value`, `number` and `few`."""

    query: str
    train: tuple[str, ...]
    heldout: tuple[str, ...]


QUESTIONS = (
    Question(
        "SELECT COUNT(*) FROM {table} WHERE {group} = '{value}'",
        (
            "How many {table} have the {group} {value}?",
            "Count the {table} with {group} {value}.",
            "How many {value} {table} are there?",
        ),
        ("What is the number of {table} whose {group} is {value}?", "Tell me how many {table} are of {group} {value}."),
    ),
    Question(
        "SELECT {name} FROM {table} WHERE {group} = '{value}'",
        (
            "List the {name}s of {table} with {group} {value}.",
            "Which {table} have the {group} {value}?",
            "Name all {value} {table}.",
        ),
        (
            "Show the {name} of every one of the {table} whose {group} is {value}.",
            "I want the {name}s for {group} {value}.",
        ),
    ),
    Question(
        "SELECT {name} FROM {table} WHERE {amount} > {number}",
        ("List the {name}s of {table} with a {amount} over {number}.", "Which {table} have a {amount} above {number}?"),
        (
            "Show the {name}s of {table} whose {amount} is more than {number}.",
            "I want {name}s where {amount} exceeds {number}.",
        ),
    ),
    Question(
        "SELECT COUNT(*) FROM {table} WHERE {amount} < {number}",
        ("How many {table} have a {amount} under {number}?", "Count the {table} with a {amount} below {number}."),
        ("What is the number of {table} whose {amount} is less than {number}?",),
    ),
    Question(
        "SELECT {name} FROM {table} WHERE {group} = '{value}' AND {other} < {number}",
        (
            "Which {value} {table} have a {other} below {number}?",
            "List {name}s with {group} {value} and {other} under {number}.",
        ),
        ("Show {name}s where {group} is {value} and {other} is less than {number}.",),
    ),
    Question(
        "SELECT AVG({amount}) FROM {table}",
        (
            "What is the average {amount} of the {table}?",
            "Mean {amount} over all {table}?",
            "Average {amount}, please.",
        ),
        ("Give the average {amount} for all {table}.", "What {amount} do {table} have on average?"),
    ),
    Question(
        "SELECT SUM({other}) FROM {table} WHERE {group} = '{value}'",
        ("What is the total {other} of {table} with {group} {value}?", "Sum the {other} where {group} is {value}."),
        ("Add up the {other} of all {table} whose {group} is {value}.",),
    ),
    Question(
        "SELECT MAX({amount}) FROM {table}",
        ("What is the highest {amount}?", "Find the maximum {amount} of the {table}."),
        ("What is the largest {amount} among all {table}?",),
    ),
    Question(
        "SELECT MIN({other}) FROM {table} WHERE {group} = '{value}'",
        ("What is the lowest {other} for {group} {value}?", "Minimum {other} of {table} with {group} {value}?"),
        ("Give the smallest {other} where {group} is {value}.",),
    ),
    Question(
        "SELECT {group}, COUNT(*) FROM {table} GROUP BY {group}",
        ("Count the {table} for each {group}.", "How many {table} are there per {group}?"),
        ("For every {group}, give the number of {table}.",),
    ),
    Question(
        "SELECT {group}, AVG({other}) FROM {table} GROUP BY {group}",
        ("What is the average {other} per {group}?", "Give the mean {other} for each {group}."),
        ("For every {group}, what is the average {other}?",),
    ),
    Question(
        "SELECT {name} FROM {table} ORDER BY {amount} DESC LIMIT {few}",
        ("List the {few} {table} with the highest {amount}.", "Name the top {few} {table} by {amount}."),
        ("Show the {name}s of the {few} {table} with the largest {amount}.",),
    ),
)

_NAMES = names("row_names")


def draw(split: Split, rng: random.Random) -> Example:
    """One question whose answer depends on its condition."""
    while True:
        table = rng.choice(TABLES[split])
        number = rng.randrange(len(QUESTIONS))
        question = QUESTIONS[number]
        template, wording = pick(getattr(question, split), f"{split}-{number:02d}-", rng)
        limits = table.amounts if "{amount}" in question.query else table.others
        slots = {
            **table._asdict(),
            "value": rng.choice(table.groups),
            "number": rng.choice(_numbers(limits, split)),
            "few": rng.choice((2, 3, 4)),
        }
        script = _script(table, split, rng)
        answer = question.query.format(**slots)
        if _means_something(script, answer):
            break
    used = [str(slots[slot]) for slot in ("table", "value", "number") if f"{{{slot}}}" in question.query]
    schema = f"{table.table}({table.name}, {table.group}, {table.amount}, {table.other})"
    return Example(f"{schema}\n{wording.format(**slots)}", answer, template, tuple(used), script)


def _numbers(limits: range, split: Split) -> list[int]:
    """Multiples of four are held out."""
    return [number for number in limits if (number % 4 == 0) == (split == "heldout")]


def _script(table: Table, split: Split, rng: random.Random) -> str:
    """CREATE TABLE and its rows, in which no name and no number comes twice in a column."""
    columns = (
        rng.sample(_NAMES[split], ROWS),
        [rng.choice(table.groups) for _ in range(ROWS)],
        rng.sample(_numbers(table.amounts, split), ROWS),
        rng.sample(_numbers(table.others, split), ROWS),
    )
    rows = (f"('{name}', '{group}', {amount}, {other})" for name, group, amount, other in zip(*columns, strict=True))
    return (
        f"CREATE TABLE {table.table} ({table.name} TEXT, {table.group} TEXT, {table.amount} INTEGER, "
        f"{table.other} INTEGER);\nINSERT INTO {table.table} VALUES {', '.join(rows)};"
    )


def _means_something(script: str, query: str) -> bool:
    """Neither empty, nor zero, nor what comes without the condition, with half of it, or with its opposite."""
    head, where, condition = query.partition(" WHERE ")
    wrong = [head, query.partition(" AND ")[0], f"{head} WHERE NOT ({condition})"] if where else []
    database = sqlite3.connect(":memory:")
    try:
        database.executescript(script)
        result = database.execute(query).fetchall()
        others = [database.execute(other).fetchall() for other in wrong if other != query]
    finally:
        database.close()
    return bool(result) and result[0][0] not in {0, None} and result not in others


TASK = Task(
    name="sql",
    system="Write one SQLite SELECT that answers the question. Reply with SQL only.",
    draw=draw,
)
