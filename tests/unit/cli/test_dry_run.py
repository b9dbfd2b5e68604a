"""`--dry-run` ends with what the same command would do without it, and does nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tuneship.cli import up
from tuneship.cli.pipeline import Pipeline, identify
from tuneship.core import hardware, model_source, recipe_file
from tuneship.core.errors import PreflightError, RecipeError
from tuneship.core.hardware import Gpu, Hardware
from tuneship.core.rundir import RunDir
from tuneship.serve import choice


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNESHIP_CACHE", str(tmp_path / "cache"))
    row = {"messages": [{"role": "user", "content": "Add 1 and 2."}, {"role": "assistant", "content": "3"}]}
    Path("rows.jsonl").write_text(json.dumps(row) + "\n")
    file = tmp_path / "tiny.toml"
    file.write_text(f'[model]\nid = "{tiny_model}"\n[data]\ntrain = "rows.jsonl"\n')
    return file


@pytest.fixture
def said(recipe: Path, capsys) -> Callable[..., str]:
    """Factory (overrides, verb=up, options) -> what a dry run says last."""

    def dry(*words: str, verb=up.up, **options) -> str:
        verb(recipe, *words, dry_run=True, **options)
        return capsys.readouterr().err.splitlines()[-1].removeprefix("nothing was done; without --dry-run: ")

    return dry


def test_what_would_be_done_is_its_last_line(recipe: Path, said):
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
    # Whether its bytes are those that were sealed is only known when they are read.
    kept = "runs/tiny has what this trains, adapter-0123: it is kept if it is whole"
    assert said(verb=up.train).startswith(f"{kept} (`tuneship up RECIPE --from train`")
    assert said() == f"{kept}, then merge, serve, bench"
    assert said(from_="merge") == f"{kept}, then merge, serve, bench"
    assert said(from_="train") == "trains in runs/tiny, then merge, serve, bench"
    assert said("--lora.rank", "4") == "trains in runs/tiny, then merge, serve, bench"


def test_a_mode_that_was_decided_says_whether_it_merges(said, monkeypatch):
    decide = choice.decide

    def on_nf4(recipe, source, machine):
        serve = recipe.serve.model_copy(update={"mode": "adapters", "quantization": "nf4"})
        return decide(recipe.model_copy(update={"serve": serve}), source, machine)

    auto = ("--serve.mode", "auto")
    assert said(*auto) == "trains in runs/tiny, then merge, serve, bench"
    assert said(*auto, until="merge") == "trains in runs/tiny, then merge"
    monkeypatch.setattr(choice, "decide", on_nf4)
    assert said(*auto) == "trains in runs/tiny, then serve, bench"
    assert said(*auto, until="merge") == "trains in runs/tiny"


def test_full_training_makes_the_checkpoint_that_others_merge(said):
    full = ("--train.method", "full", "--quantization.method", "none")
    assert said(*full) == "trains in runs/tiny, then serve, bench"
    assert said(*full, until="merge") == "trains in runs/tiny"


def test_what_merges_alone_is_planned_on_a_card_that_sglang_does_not_serve_on(said, monkeypatch):
    """The hint of what refuses that card is to run just this."""
    card = Gpu("Tesla T4", 16 * 2**30, (7, 5))
    monkeypatch.setattr(hardware, "detect", lambda: Hardware((card,), "1", "a processor", 2, 16 * 2**30))
    merged = ("--serve.mode", "merged")
    assert said(*merged, until="merge") == "trains in runs/tiny, then merge"
    for until, words in (("serve", merged), ("merge", ("--serve.mode", "auto"))):
        with pytest.raises(PreflightError, match="does not serve on Tesla T4"):
            said(*words, until=until)


def test_an_adapter_that_would_be_called_as_its_base_is_refused_as_it_would_be(said, tiny_model: Path):
    named = ("--name", tiny_model.name)
    assert said(*named).startswith("trains in")
    with pytest.raises(PreflightError, match="both the base and the adapter would be called"):
        said(*named, "--serve.mode", "adapters")


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
