"""When the base is measured, and measured again: by what its figures depend on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w

from tuneship.cli.pipeline import Pipeline, Target
from tuneship.core import artifact as artifacts
from tuneship.core import recipe_file
from tuneship.core.artifact import Artifact, Base, Manifest, QuantizationRecord, TemplateRecord
from tuneship.core.errors import ArtifactError
from tuneship.core.model_source import ModelSource
from tuneship.core.parity import ReferenceRow, write_reference
from tuneship.core.rundir import RunDir

BASE = Base(id="org/base", revision="main", weights_sha256="a" * 64, architecture="LlamaForCausalLM")
Made = Callable[..., Artifact]


@pytest.fixture
def trained(tmp_path: Path) -> Made:
    """Factory (name, token ids=(), trained=) -> an adapter whose evidence asks about these tokens."""

    def make(name: str, ids: tuple[int, ...] = (), said: float = 0.0) -> Artifact:
        path = tmp_path / name
        path.mkdir()
        if ids:
            log_p = [said] * len(ids)
            mask = [0] + [1] * (len(ids) - 1)
            row = ReferenceRow(input_ids=list(ids), loss_mask=mask, dtype="float32", base=log_p, trained=log_p)
            write_reference(path / "evidence", [row])
        quantization = QuantizationRecord(method="nf4", double=True, compute_dtype="bfloat16")
        template = TemplateRecord(text="", sha256="c", source="model")
        about = {"base": BASE, "quantization": quantization, "template": template}
        return Artifact(path, Manifest(kind="adapter", content_id=name, input_id="1", end_token_ids=(2,),
                                       tokenizer_sha256="b", **about))  # fmt: skip

    return make


@pytest.fixture
def pipeline(tmp_path: Path) -> Callable[[dict], Pipeline]:
    """Factory (the recipe's bench) -> a pipeline in a run directory of its own."""
    for name in ("rows.jsonl", "mine.py", "trace.jsonl"):
        (tmp_path / name).write_text(name)
    (tmp_path / "run").mkdir()

    def make(bench: dict) -> Pipeline:
        file = tmp_path / "recipe.toml"
        file.write_text(tomli_w.dumps({"model": {"id": "org/base"}, "data": {"train": "rows.jsonl"}, "bench": bench}))
        return Pipeline(RunDir(tmp_path / "run"), recipe_file.load(file))

    return make


def _measured(work: Pipeline, served: Artifact) -> None:
    """Record, as the stage's end does, that the base was measured."""
    attempt = work.run.new_attempt("baseline")
    (attempt / "eval.json").write_text("{}")
    work.run.finish("baseline", work._baseline_id(BASE, served), attempt / "eval.json", attempt)
    assert not work.needs_baseline(BASE, served)


def test_there_is_nothing_to_ask_the_base(pipeline, trained):
    work = pipeline({})
    assert not work.needs_baseline(BASE, trained("no-rows"))
    assert work.baseline(BASE, "base", trained("no-rows-either")) is None


def test_held_out_rows_alone_are_something_to_ask(pipeline, trained):
    assert pipeline({}).needs_baseline(BASE, trained("rows", ids=(1, 2)))


def test_a_new_training_on_the_same_rows_asks_the_base_nothing_again(pipeline, trained):
    work = pipeline({})
    _measured(work, trained("one", ids=(1, 2, 3)))
    assert not work.needs_baseline(BASE, trained("again", ids=(1, 2, 3), said=-0.5))
    assert work.needs_baseline(BASE, trained("others", ids=(1, 2, 4)))


@pytest.mark.parametrize("file", ["rows.jsonl", "mine.py", "trace.jsonl"])
def test_a_changed_file_is_measured_again(pipeline, trained, tmp_path: Path, file: str):
    tasks = [{"task": "python:mine.py:f", "data": "rows.jsonl"}]
    work, served = pipeline({"eval": tasks, "load": {"trace": "trace.jsonl"}}), trained("one")
    assert work.needs_baseline(BASE, served)
    _measured(work, served)
    (tmp_path / file).write_text("something else")
    assert work.needs_baseline(BASE, served)


def test_an_adapter_that_was_damaged_is_trained_again_and_a_whole_one_is_kept(pipeline, tmp_path, monkeypatch, capsys):
    """`train` said "unchanged", and the hint of what then refused it was to train again."""
    made = []

    def run_job(job, _module, _grace_s):
        made.append(job.stage)
        with artifacts.draft(job.run.artifacts) as work:
            (work / "adapter_model.safetensors").write_bytes(b"weights")
            manifest = Manifest(kind="adapter", input_id=job.input_id, end_token_ids=(2,), tokenizer_sha256="b",
                                base=BASE, quantization=QuantizationRecord(method="none", double=False,
                                compute_dtype="float32"), template=TemplateRecord(text="", sha256="c",
                                source="model"))  # fmt: skip
            return artifacts.seal(work, manifest).path

    monkeypatch.setattr("tuneship.cli.pipeline.run_job", run_job)
    base = tmp_path / "base"
    base.mkdir()
    (base / "tokenizer.json").write_text("{}")
    (base / "config.json").write_text("{}")
    work, source = pipeline({}), ModelSource("org/base", "main", base)
    first = work.train(source, BASE)
    assert work.train(source, BASE) == first
    assert made == ["train"]
    assert f"train: unchanged, {first.path.name}" in capsys.readouterr().err
    weights = first.path / "adapter_model.safetensors"
    weights.write_bytes(b"weighty")
    again = work.train(source, BASE)
    assert made == ["train", "train"]
    assert artifacts.open_artifact(again.path) == again
    said = capsys.readouterr().err
    assert "train: again, for" in said
    assert "was changed after it was written" in said
    assert "unchanged" not in said
    manifest = again.path / artifacts.MANIFEST
    os.truncate(manifest, 200)
    assert artifacts.open_artifact(work.train(source, BASE).path).path == again.path
    assert made == ["train"] * 3
    assert "train: again, for" in (said := capsys.readouterr().err)
    assert "artifact.json cannot be read" in said
    (again.path / "notes.txt").touch()  # hours of training would not remove it
    with pytest.raises(ArtifactError, match="does not belong"):
        work.train(source, BASE)
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"schema": 99}))
    with pytest.raises(ArtifactError, match="schema 99"):
        work.train(source, BASE)
    assert len(made) == 3


def test_a_server_is_given_the_time_that_it_gives_what_is_in_flight(pipeline, monkeypatch, tmp_path):
    given = []

    def start(_job, _module, grace_s):
        given.append(grace_s)
        raise InterruptedError

    monkeypatch.setattr("tuneship.cli.pipeline.StageProcess", start)
    work = pipeline({})
    with pytest.raises(InterruptedError), work.serve(Target(tmp_path, "sql")):
        pass
    assert given[0] > work.recipe.serve.drain_s
