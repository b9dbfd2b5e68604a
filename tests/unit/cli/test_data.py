"""`tuneship data`: what a person or a CI job sees of it."""

from __future__ import annotations

import json

import pytest

from tuneship.cli import data
from tuneship.core.errors import DataError, ExitCode, RecipeError

GOOD = {"prompt": "one", "completion": "uno"}


@pytest.fixture
def recipe(tmp_path, tiny_model):
    """(train rows, held-out rows) -> the recipe's path."""

    def write(train, heldout=()):
        for name, rows in (("train", train), ("heldout", heldout)):
            lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        path = tmp_path / "recipe.toml"
        held = 'heldout = "heldout.jsonl"' if heldout else ""
        path.write_text(f'[model]\nid = "{tiny_model}"\n[data]\ntrain = "train.jsonl"\n{held}\n')
        return path

    return write


def test_a_clean_recipe_passes(recipe, capsys):
    data.check(recipe([GOOD], [{"prompt": "two", "completion": "dos"}]))
    printed = capsys.readouterr().out
    assert "every row can be used" in printed
    assert "with loss" in printed


def test_refused_rows_are_named_and_fail(recipe, capsys):
    with pytest.raises(DataError, match="2 of 5 rows cannot be used") as failed:
        data.check(recipe([GOOD, "{", GOOD], [{"prompt": "one"}, GOOD]))
    assert failed.value.exit_code == ExitCode.FAILED
    printed = capsys.readouterr().out
    assert "train: 1 row refused: not JSON" in printed
    assert "train.jsonl:2: not JSON" in printed
    assert "heldout.jsonl:1: has the keys prompt" in printed
    assert "train.jsonl:3 is train.jsonl:1" in printed
    assert "train: 2 rows in held-out too, prompt and answer\n  train.jsonl:1 is heldout.jsonl:2" in printed


def test_where_no_row_fits_own_columns_are_the_way_out(recipe, capsys):
    with pytest.raises(DataError, match="1 of 1 rows cannot be used") as failed:
        data.check(recipe([{"question": "one", "answer": "two"}]))
    assert failed.value.hint == "mend them"
    assert "data.columns = { prompt = " in capsys.readouterr().out


def test_rows_that_are_left_out_on_purpose_do_not_fail(recipe, capsys):
    data.check(recipe([GOOD, "{"]), "--data.on_bad_row", "skip")
    assert "train.jsonl:2: not JSON" in capsys.readouterr().out


def test_as_json_it_is_all_there(recipe, capsys):
    with pytest.raises(DataError):
        data.check(recipe([GOOD, "{"], [GOOD]), json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["train"]["rows"] == 2
    same = {"rows": 1, "first": ["train.jsonl:1 is heldout.jsonl:1"], "hint": ""}
    assert found["same_conversation"] == same
    (refused,) = found["train"]["refused"].values()
    assert refused["rows"] == 1


def test_a_split_without_any_row_that_can_be_read_is_shown_too(recipe, capsys):
    with pytest.raises(DataError, match="1 of 2 rows"):
        data.check(recipe([GOOD], ["{"]))
    (median,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("max_length for 95%"))
    assert median.split()[-1] == "-"


def test_how_many_answers_would_be_cut_is_said(recipe, capsys):
    long = {"prompt": "a", "completion": "b " * 50}
    with pytest.raises(DataError):
        data.check(recipe([GOOD, long]), "--data.max_length", "32")
    printed = " ".join(capsys.readouterr().out.split())
    assert "over data.max_length = 32 (cut there, 1 would lose the end of their last answer and 0 all of it)" in printed


def test_show_marks_what_is_trained(recipe, capsys):
    path = recipe([GOOD, "{"], [{"prompt": "two", "completion": "[dos]"}])
    data.show(path)
    printed = capsys.readouterr().out
    assert "user\none<|im_end|>\n<|im_start|>assistant\n{+uno<|im_end|>+}\n" in printed
    assert "--- train.jsonl:2, refused: not JSON" in printed
    data.show(path, split="heldout", rows=1)
    assert "{+[dos]<|im_end|>+}" in capsys.readouterr().out
    with pytest.raises(RecipeError, match="has no data"):
        data.show(recipe([GOOD]), split="heldout")


@pytest.mark.parametrize("verb", [data.check, data.show])
def test_rows_of_the_hub_are_fetched(recipe, verb, monkeypatch, tmp_path):
    """As `plan` and `up` fetch them; here the hub cannot be reached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="cannot fetch the data set owner/name"):
        verb(recipe([GOOD]), "--data.train", "hub:owner/name")
