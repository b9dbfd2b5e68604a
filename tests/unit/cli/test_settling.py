"""How a run will be served: decided, said, and on record before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from safetensors.numpy import save_file

from tuneship.cli import settling, summary
from tuneship.cli.pipeline import Pipeline
from tuneship.core import hardware, recipe_file
from tuneship.core.errors import PlanError, PreflightError
from tuneship.core.hardware import Gpu, Hardware
from tuneship.core.model_source import ModelSource
from tuneship.core.rundir import RunDir
from tuneship.serve import choice

GIB = 2**30
HIDDEN, VOCAB, LENGTH = 256, 512, 1024
CONFIG = {
    "hidden_size": HIDDEN, "intermediate_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": VOCAB, "max_position_embeddings": LENGTH,
}  # fmt: skip
Work = Callable[..., Pipeline]


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file({"model.embed_tokens.weight": np.zeros((VOCAB, HIDDEN), np.float16)}, folder / "model.safetensors")
    return ModelSource("org/base", "main", folder)


@pytest.fixture
def pipeline(tmp_path: Path) -> Work:
    """Factory (settings of [serve]) -> a pipeline in a run directory."""
    (tmp_path / "rows.jsonl").write_text("{}")

    def make(**serve: Any) -> Pipeline:
        file = tmp_path / "recipe.toml"
        file.write_text(tomli_w.dumps({"model": {"id": "org/base"}, "data": {"train": "rows.jsonl"}, "serve": serve}))
        run = RunDir(tmp_path / "run")
        run.path.mkdir()
        recipe = recipe_file.load(file)
        recipe_file.save(recipe, run.recipe)
        return Pipeline(run, recipe)

    return make


def on(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    machine = Hardware((), "", "a processor", 2, int(gib * GIB))
    monkeypatch.setattr(hardware, "detect", lambda: machine)


def record(work: Pipeline) -> dict[str, Any]:
    return json.loads((work.run.path / "plan.json").read_text())["serve"]


def test_auto_is_decided_said_and_recorded(pipeline: Work, source: ModelSource, monkeypatch, capsys):
    on(monkeypatch, 16)
    settled = settling.settle(pipeline(mode="auto"), source)
    assert (settled.recipe.serve.mode, settled.recipe.serve.quantization) == ("merged", "none")
    assert recipe_file.load(settled.run.recipe) == settled.recipe, "its stages read another recipe"
    assert "serve.mode = auto: merged: it fits this machine" in capsys.readouterr().err
    found = record(settled)
    assert (found["asked"], found["mode"]) == ("auto", "merged")
    assert found["memory"]["kv_tokens"] == 20_000


def test_auto_that_fits_nowhere_ends_before_training(pipeline: Work, source: ModelSource, monkeypatch):
    on(monkeypatch, 4)
    work = pipeline(mode="auto")
    with pytest.raises(PlanError):
        settling.settle(work, source)
    assert recipe_file.load(work.run.recipe).serve.mode == "auto"


def test_a_named_mode_that_looks_too_large_is_a_warning(pipeline: Work, source: ModelSource, monkeypatch, capsys):
    on(monkeypatch, 4)
    settled = settling.settle(pipeline(mode="merged"), source)
    assert settled.recipe.serve.mode == "merged"
    assert "warning: the server may not fit" in capsys.readouterr().err


def test_what_cannot_be_planned_is_no_obstacle_to_a_named_mode(pipeline: Work, source: ModelSource, capsys):
    (source.path / "config.json").write_text(json.dumps({**CONFIG, "num_local_experts": 8}))
    work = pipeline(mode="merged")
    assert settling.settle(work, source) == work
    assert "num_local_experts" in capsys.readouterr().err


def test_what_sglang_would_refuse_ends_before_training(pipeline: Work, source: ModelSource, monkeypatch):
    on(monkeypatch, 16)
    with pytest.raises(PreflightError, match="tensor parallel 2"):
        settling.settle(pipeline(mode="adapters", quantization="nf4", extra_args=["--tp", "2"]), source)


def test_an_adapter_that_would_be_called_as_its_base_ends_before_training(pipeline: Work, source, monkeypatch):
    on(monkeypatch, 16)
    work = pipeline(mode="adapters")
    with pytest.raises(PreflightError, match="both the base and the adapter would be called 'recipe'"):
        settling.settle(work, source._replace(id="bundled:recipe"))


def test_names_are_looked_at_where_memory_cannot_be_planned_too(pipeline: Work, source: ModelSource):
    (source.path / "config.json").write_text(json.dumps({**CONFIG, "num_local_experts": 8}))
    work = pipeline(mode="adapters")
    assert settling.settle(work, source) == work
    with pytest.raises(PreflightError, match="both the base and the adapter would be called 'recipe'"):
        settling.settle(work, source._replace(id="bundled:recipe"))


def test_the_plan_is_printed_by_its_terms(pipeline: Work, source: ModelSource, capsys):
    card = Hardware((Gpu("a card", 24 * GIB, (8, 9)),), "1", "a processor", 8, 32 * GIB)
    recipe = pipeline(mode="adapters", quantization="nf4").recipe
    summary.show_serving(choice.decide(recipe, source, card))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    printed = " ".join(lines)  # a long reason is wrapped
    assert "mode as an adapter on the NF4 base (the recipe says so; the same values in 16 bits" in printed
    assert "--serve.quantization dequantized)" in printed
    assert "device a card, 24.00 GiB" in lines
    # a: 3 + 1 + 2 + 1, b: 3 + 1 + 2 + 1 times 256 values, 64 ranks, 2 bytes
    assert "adapter slots 0.00 GiB (9 of 0.4 MiB, one the base's)" in lines
    assert any(line.startswith("streams") and line.endswith(f"x {LENGTH:,} tokens") for line in lines)
    assert any(line.startswith("note reserve and runtime are estimated") for line in lines)
