"""What each scorer takes for right, and what for wrong."""

import json

import pytest

from tuneship.bench.quality.tasks import SCORERS, find_scorer
from tuneship.core import recipe_bench
from tuneship.core.errors import DataError

CHOICES = {"choices": ["Paris", "Rome", "New York"]}
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


def test_the_recipe_names_every_scorer() -> None:
    assert set(SCORERS) == set(recipe_bench.SCORERS)


@pytest.mark.parametrize(
    ("task", "answer", "reference", "extra", "score"),
    [
        ("normalised", "the  Eiffel-Tower!", "Eiffel Tower", {}, 0),
        ("normalised", "The Eiffel Tower.", "eiffel tower", {}, 1),
        ("normalised", "\u00bfUn caf\u00e9?", "un CAF\u00c9", {}, 1),
        ("normalised", "", "Paris", {}, 0),
        ("choice", "B", "B", {}, 1),
        ("choice", "(b) because", "B", {}, 1),
        ("choice", "**B.** Rome", "B", CHOICES, 1),
        ("choice", "The answer is C", "C", {}, 1),
        ("choice", "A dog", "A", {}, 0),
        ("choice", "Rome", "B", CHOICES, 1),
        ("choice", "B", "rome", CHOICES, 1),
        ("choice", "It is New York, of course", "C", CHOICES, 1),
        ("choice", "Paris or Rome", "B", CHOICES, 0),
        ("choice", "", "A", CHOICES, 0),
        ("choice", "Positive.", "positive", {}, 1),
        ("regex", "so #### 42", "#### 42", {"pattern": r"#### (\d+)"}, 1),
        ("regex", "so #### 43", "#### 42", {"pattern": r"#### (\d+)"}, 0),
        ("regex", "42", "#### 42", {"pattern": r"#### (\d+)"}, 0),
        ("regex", "id AB-12 it is", "AB-12", {"pattern": r"[A-Z]+-\d+"}, 1),
        ("numeric", "3 and 4 make 7.", "7", {}, 1),
        ("numeric", "1,234.50 EUR", "1234.5", {}, 1),
        ("numeric", "7-5", "-5", {}, 0),
        ("numeric", "minus: -5", "-5", {}, 1),
        ("numeric", "3.1", "3.14", {"tolerance": 0.05}, 1),
        ("numeric", "3.0", "3.14", {"tolerance": 0.05}, 0),
        ("numeric", "1e3", "1000", {}, 1),
        ("numeric", ".5", "0.5", {}, 1),
        ("numeric", "none", "0", {}, 0),
        ("rouge-l", "the cat sat", "the cat sat", {}, 1),
        ("rouge-l", "the cat", "the cat sat down", {}, 2 / 3),
        ("json-schema", '```json\n{"n": 3}\n```', '{"n": 1}', {"schema": SCHEMA}, 1),
        ("json-schema", '{"n": "3"}', '{"n": 1}', {"schema": json.dumps(SCHEMA)}, 0),
        ("json-schema", "no", '{"n": 1}', {"schema": SCHEMA}, 0),
    ],
)
def test_scores(task, answer, reference, extra, score) -> None:
    assert SCORERS[task](answer, reference, extra) == pytest.approx(score)
    assert SCORERS[task](reference, reference, extra) == 1


@pytest.mark.parametrize(
    ("task", "reference", "extra", "message"),
    [
        ("normalised", "The!", {}, "no word"),
        ("choice", "Berlin", CHOICES, "none of the choices"),
        ("choice", "D", CHOICES, "none of the choices"),
        ("choice", "A", {"choices": "Paris"}, "no list"),
        ("regex", "42", {}, "no option 'pattern'"),
        ("regex", "42", {"pattern": "("}, "pattern:"),
        ("regex", "42", {"pattern": "x"}, "does not match"),
        ("numeric", "many", {}, "no number"),
        ("json-schema", "{}", {"schema": SCHEMA}, "does not allow"),
        ("json-schema", "{}", {}, "have a 'schema'"),
        ("json-schema", "{}", {"schema": {"type": "no such"}}, "not a JSON schema"),
        ("json-schema", "{}", {"schema": {"$ref": "http://127.0.0.1:1/x"}}, "not in it"),
        ("json-schema", "{}", {"schema": "/no/such/file"}, "No such file"),
    ],
)
def test_references_that_cannot_be_scored(task, reference, extra, message) -> None:
    with pytest.raises(ValueError, match=message):
        SCORERS[task](reference, reference, extra)


def test_a_schema_from_a_file(tmp_path) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    assert SCORERS["json-schema"]('{"n": 2}', '{"n": 1}', {"schema": str(file)}) == 1


def test_a_function_of_the_users_own(tmp_path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def half(answer, reference, row):\n    return row['weight'] * (answer == reference)\n")
    score = find_scorer(f"python:{file}:half")
    assert (score("a", "a", {"weight": 0.5}), score("b", "a", {"weight": 0.5})) == (0.5, 0)
    with pytest.raises(DataError, match=r"not in 0\.\.1"):
        score("a", "a", {"weight": 2})
    with pytest.raises(DataError, match="half failed on 'a': KeyError"):
        score("a", "a", {})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exakt", "no task 'exakt'"),
        ("python:gone.py:f", "no such Python file"),
        ("python:{bad}:f", "cannot be imported: ZeroDivisionError"),
        ("python:{good}:g", "no function 'g'"),
    ],
)
def test_scorers_that_there_are_not(tmp_path, name, message) -> None:
    bad, good = tmp_path / "bad.py", tmp_path / "good.py"
    bad.write_text("1 / 0")
    good.write_text("f = len")
    with pytest.raises(DataError, match=message):
        find_scorer(name.format(bad=bad, good=good))
