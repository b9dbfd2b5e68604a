"""`--dry-run` ends with what the same command would do without it, and does nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tuneship.cli import up
from tuneship.cli.pipeline import Pipeline, identify
from tuneship.core import model_source, recipe_file
from tuneship.core.errors import RecipeError
from tuneship.core.rundir import RunDir


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNESHIP_CACHE", str(tmp_path / "cache"))
    row = {"messages": [{"role": "user", "content": "Add 1 and 2."}, {"role": "assistant", "content": "3"}]}
    Path("rows.jsonl").write_text(json.dumps(row) + "\n")
    file = tmp_path / "tiny.toml"
    file.write_text(f'[model]\nid = "{tiny_model}"\n[data]\ntrain = "rows.jsonl"\n')
    return file


def test_what_would_be_done_is_its_last_line(recipe: Path, capsys):
    def said(*words: str, verb=up.up, **options) -> str:
        verb(recipe, *words, dry_run=True, **options)
        return capsys.readouterr().err.splitlines()[-1].removeprefix("nothing was done; without --dry-run: ")

    assert said(verb=up.train) == "trains in runs/tiny"
    assert said(verb=up.train, smoke=8) == "trains in runs/tiny-smoke"
    assert said() == "trains in runs/tiny, then merge, serve, bench"
    assert said("--serve.mode", "adapters", until="serve") == "trains in runs/tiny, then serve"
    assert not Path("runs").exists()
    resolved = recipe_file.load(recipe)
    source = model_source.resolve(resolved.model.id)
    run = RunDir(Path("runs/tiny").absolute())
    (run.artifacts / "adapter-0123").mkdir(parents=True)
    identity = Pipeline(run, resolved)._train_id(source, identify(source))
    run.finish("train", identity, run.artifacts / "adapter-0123", Path("attempt-1"))
    kept = "runs/tiny has what this trains, adapter-0123: it is kept"
    assert said(verb=up.train).startswith(f"{kept} (`tuneship up RECIPE --from train`")
    assert said() == f"{kept}, then merge, serve, bench"
    assert said(from_="merge") == f"{kept}, then merge, serve, bench"
    assert said(from_="train") == "trains in runs/tiny, then merge, serve, bench"
    assert said("--lora.rank", "4") == "trains in runs/tiny, then merge, serve, bench"


def test_a_training_needs_no_plan_of_a_server(recipe: Path, capsys):
    """Where none would fit, `up --until train` trains all the same."""
    up.train(recipe, "--serve.context_length", "1000", dry_run=True)
    printed = capsys.readouterr().out
    assert "steps" in printed
    assert "KV cache" not in printed


def test_an_option_that_a_verb_does_not_have_leads_to_its_help(recipe: Path):
    with pytest.raises(RecipeError, match="--dry-rum needs a value") as refused:
        up.train(recipe, "--dry-rum")
    assert "--help" in refused.value.hint
