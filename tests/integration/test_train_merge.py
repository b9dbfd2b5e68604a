"""`tuneship train` and `merge` on a tiny real model: artifacts, evidence, resume, and every way to be stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tuneship.core.artifact import open_artifact
from tuneship.core.errors import ParityError
from tuneship.core.parity import Parity, read_reference
from tuneship.core.rundir import RunDir

pytestmark = pytest.mark.integration

ROWS = 48
RECIPE = """
name = "tiny"
[model]
id = "{model}"
dtype = "float32"
[data]
train = "train.jsonl"
heldout = "heldout.jsonl"
[lora]
rank = 8
[train]
effective_batch = 8
steps = 12
learning_rate = 5e-3
optimizer = "adamw"
[merge]
max_nll_increase = 0.5
"""


def write_rows(path: Path, count: int, first: int = 0) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"count {i}"}, {"role": "assistant", "content": f"the total is {i}"}]}
        for i in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def project(tiny_model, tmp_path_factory) -> Path:
    """A folder with a recipe and its data."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "tiny.toml").write_text(RECIPE.format(model=tiny_model))
    write_rows(folder / "train.jsonl", ROWS)
    write_rows(folder / "heldout.jsonl", 16, first=100)
    return folder


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "tuneship", *map(str, args)]


def tuneship(*args: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*args), cwd=cwd, capture_output=True, text=True, timeout=200, check=False)


@pytest.fixture(scope="module")
def merged(project) -> RunDir:
    """A run that trained and merged."""
    done = tuneship("up", "tiny.toml", "--until", "merge", cwd=project)
    assert done.returncode == 0, done.stderr
    return RunDir(project / "runs" / "tiny")


def test_the_adapter_says_where_it_comes_from(merged, tiny_model):
    (path,) = merged.artifacts.glob("adapter-*")
    manifest = open_artifact(path, kind="adapter").manifest
    assert manifest.base.id == str(tiny_model)
    assert manifest.base.architecture == "LlamaForCausalLM"
    assert manifest.quantization.method == "nf4"
    assert manifest.lora is not None
    assert manifest.lora.target_modules == (
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"
    )  # fmt: skip
    assert manifest.end_token_ids == (2,)
    assert manifest.data is not None
    assert manifest.data.rows == ROWS
    assert 0 < manifest.data.loss_tokens < manifest.data.tokens
    assert "torch" in manifest.versions


def test_the_loss_falls_and_every_step_is_on_record(merged):
    lines = (merged.latest("train") / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 1


def test_the_evidence_replays_what_training_knew(merged):
    (path,) = merged.artifacts.glob("adapter-*")
    rows = list(read_reference(path / "evidence"))
    assert len(rows) == 16
    for row in rows:
        assert len(row.input_ids) == len(row.loss_mask) == len(row.base) == len(row.trained)
    answer = [(b, t) for row in rows for b, t, m in zip(row.base, row.trained, row.loss_mask, strict=True) if m]
    assert sum(t for _, t in answer) > sum(b for b, _ in answer), "the trained model is no better than its base"


def test_the_merged_checkpoint_passed_parity_and_stops_where_training_stopped(merged):
    (path,) = merged.artifacts.glob("merged-*")
    artifact = open_artifact(path, kind="merged")
    parity = Parity.model_validate_json((path / "evidence" / "parity-1.json").read_text())
    assert parity.passed
    assert not parity.forced
    assert 0 <= parity.kl_mean < 1
    assert parity.nll < parity.nll_base
    assert parity.candidates.keys() == {"original", "dequantized"}
    assert parity.nll == parity.candidates[parity.merged_into] == min(parity.candidates.values())
    assert json.loads((path / "generation_config.json").read_text())["eos_token_id"] == [2]
    assert (path / "chat_template.jinja").exists()
    assert artifact.manifest.parents == (open_artifact(next(merged.artifacts.glob("adapter-*"))).manifest.content_id,)


def test_the_merged_logits_are_the_adapters_on_the_same_base(merged, tiny_model):
    """In float32, merging is exact to rounding."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from tuneship.core.recipe import Model, Quantization
    from tuneship.train.model import load_base

    (adapter,) = merged.artifacts.glob("adapter-*")
    (path,) = merged.artifacts.glob("merged-*")
    parity = Parity.model_validate_json((path / "evidence" / "parity-1.json").read_text())
    packed = Quantization() if parity.merged_into == "dequantized" else None
    base = load_base(tiny_model, Model(id="tiny", dtype="float32"), packed)
    base = base.dequantize() if packed else base
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        wanted = PeftModel.from_pretrained(base, adapter)(ids).logits
        got = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(got, wanted, atol=2e-3, rtol=2e-3)


def test_a_second_up_does_nothing(merged, project):
    again = tuneship("up", "tiny.toml", "--until", "merge", cwd=project)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("unchanged") == 2


def copy_to_merge(run: RunDir, to: Path) -> RunDir:
    """The same run, not merged yet."""
    subprocess.run(["cp", "-r", run.path, to], check=True)
    copy = RunDir(to)
    for path in copy.artifacts.glob("merged-*"):
        shutil.rmtree(path)
    return copy


def merge_here(run: RunDir) -> Path:
    """What the stage's process does."""
    from tuneship.core.stage import Job
    from tuneship.train.merging.stage import merge_adapter

    (adapter,) = run.artifacts.glob("adapter-*")
    inputs = {"adapter": str(adapter)}
    return merge_adapter(
        Job(stage="merge", input_id="0", run_path=run.path, attempt=run.new_attempt("merge"), inputs=inputs)
    )


def test_a_changed_recipe_does_again_what_read_it_and_force_is_recorded(merged, project, tmp_path):
    copy = copy_to_merge(merged, tmp_path / "run")
    strict = ("--merge.max_nll_increase", "0", "--merge.base", "original")
    forced = tuneship("up", "tiny.toml", "--until", "merge", "--run", copy.path, *strict, "--force", cwd=project)
    assert forced.returncode == 0, forced.stderr
    assert "train: unchanged" in forced.stderr
    assert "merge: unchanged" not in forced.stderr
    (path,) = copy.artifacts.glob("merged-*")
    parity = Parity.model_validate_json((path / "evidence" / "parity-1.json").read_text())
    assert (parity.passed, parity.forced, parity.merged_into) == (False, True, "original")

    # Without it, by the same recipe.
    shutil.rmtree(path)
    with pytest.raises(ParityError, match=r"nats per token worse than the trained one \(limit 0\.0"):
        merge_here(copy)
    assert not list(copy.artifacts.glob("merged-*"))
    assert not list(copy.artifacts.glob(".draft-*"))


def test_what_does_not_fit_is_merged_into_the_original_and_left_to_verify(merged, tmp_path, monkeypatch):
    from tuneship.core.parity import Deferred
    from tuneship.train.merging import candidates

    copy = copy_to_merge(merged, tmp_path / "run")
    monkeypatch.setattr(candidates, "_USABLE", 0)
    path = merge_here(copy)
    left = Deferred.model_validate_json((path / "evidence" / "deferred-1.json").read_text())
    assert left.merged_into == "original"
    assert "GiB side by side" in left.reason
    assert not (path / "evidence" / "parity-1.json").exists()
    assert len(list(read_reference(path / "evidence"))) == 16
    assert all(row.merged is None for row in read_reference(path / "evidence"))


def test_a_changed_adapter_is_refused_by_name(merged, project, tmp_path):
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", merged.path, copy], check=True)
    (adapter,) = copy.glob("artifacts/adapter-*")
    weights = adapter / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    refused = tuneship("merge", copy, cwd=project)
    assert refused.returncode == 1
    assert "adapter_model.safetensors was changed after it was written" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert "`tuneship train RECIPE` makes it again" in refused.stderr
    again = tuneship("train", "tiny.toml", "--run", copy, cwd=project)
    assert again.returncode == 0, again.stderr
    assert "train: again, for" in again.stderr
    assert open_artifact(Path(again.stdout.strip())).manifest.kind == "adapter"
    assert "train: unchanged" in tuneship("train", "tiny.toml", "--run", copy, cwd=project).stderr


def test_full_training_makes_a_checkpoint_that_needs_no_merging(project):
    keys = ("--train.method", "full", "--quantization.method", "none", "--train.learning_rate", "1e-3")
    done = tuneship("up", "tiny.toml", *keys, "--run", "runs/full", "--until", "merge", cwd=project)
    assert done.returncode == 0, done.stderr
    (path,) = (project / "runs" / "full" / "artifacts").iterdir()
    assert done.stdout.split() == [str(path)]
    artifact = open_artifact(path, kind="merged")
    assert artifact.manifest.lora is None
    assert Parity.model_validate_json((path / "evidence" / "parity-1.json").read_text()).passed
    (row, *_) = read_reference(path / "evidence")
    assert row.merged == pytest.approx(row.trained, abs=1e-4), "float32 is written as it is"
    assert sum(row.trained) > sum(row.base)


def start_training(project: Path, run: str) -> subprocess.Popen[str]:
    args = command("train", "tiny.toml", "--train.steps", "100000", "--run", run)
    return subprocess.Popen(args, cwd=project, stderr=subprocess.PIPE, text=True)


def wait_for_steps(run: RunDir) -> psutil.Process:
    """The stage's process, once it is training."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (run.latest("train") / "metrics.jsonl").exists():
            return next(
                p for p in psutil.process_iter(["cmdline"]) if str(run.path) in " ".join(p.info["cmdline"] or [])
                and "tuneship.train" in (p.info["cmdline"] or [])
            )  # fmt: skip
        time.sleep(0.2)
    raise AssertionError("training never began")


def test_a_smoke_run_learns_from_a_few_rows_in_a_folder_of_its_own(project):
    done = tuneship("train", "tiny.toml", "--smoke", 16, cwd=project)
    assert done.returncode == 0, done.stderr
    assert "smoke: the loss fell from" in done.stderr
    (path,) = RunDir(project / "runs" / "tiny-smoke").artifacts.glob("adapter-*")
    record = open_artifact(path, kind="adapter").manifest.data
    assert record is not None
    assert record.rows == 16
    steps = (RunDir(project / "runs" / "tiny-smoke").latest("train") / "metrics.jsonl").read_text().splitlines()
    assert len(steps) == 8, "of the recipe's 12"


@pytest.mark.parametrize(("sig", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_while_training_leaves_a_checkpoint_and_nothing_else(project, sig, code):
    """And one that another training does not take for its own."""
    run = RunDir(project / "runs" / f"stopped-{sig.name}")
    process = start_training(project, str(run.path))
    stage = wait_for_steps(run)
    process.send_signal(sig)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert not stage.is_running()
    assert not list(run.artifacts.glob("*"))
    assert "Traceback" not in stderr
    assert "training was stopped after step" in stderr
    assert list(run.path.rglob("checkpoint-*"))
    if sig == signal.SIGINT:
        return
    other = tuneship("train", "tiny.toml", "--run", run.path, "--resume", cwd=project)
    assert other.returncode == 1
    assert "attempt-1 cannot be resumed: train.steps was 100000 and is 12" in other.stderr
    again = tuneship("train", "tiny.toml", "--run", run.path, cwd=project)
    assert again.returncode == 0, again.stderr
    assert "attempt-1 left a checkpoint of step" in again.stderr
    assert not list(run.path.rglob("checkpoint-*")), "what has been sealed needs no checkpoints"


def test_ctrl_c_while_merging_again_leaves_nothing_behind(merged, project, tmp_path):
    """`--from` runs a stage again although nothing changed."""
    copy = RunDir(tmp_path / "run")
    subprocess.run(["cp", "-r", merged.path, copy.path], check=True)
    before = set(copy.artifacts.iterdir())
    args = command("up", "tiny.toml", "--from", "merge", "--until", "merge", "--run", copy.path)
    process = subprocess.Popen(args, cwd=project, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(copy.artifacts.glob(".draft-*")):
        assert process.poll() is None, "merged before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "train: unchanged" in stderr
    assert set(copy.artifacts.iterdir()) == before
    assert "Traceback" not in stderr


def test_a_stage_that_the_kernel_kills_is_one_clear_error(project):
    run = RunDir(project / "runs" / "killed")
    process = start_training(project, str(run.path))
    wait_for_steps(run).kill()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "the train stage ended with SIGKILL (the kernel ends processes so when memory runs out)" in stderr
    assert "Traceback" not in stderr


def test_kill_9_of_tuneship_takes_the_stage_with_it(project):
    run = RunDir(project / "runs" / "orphan")
    process = start_training(project, str(run.path))
    stage = wait_for_steps(run)
    process.kill()
    process.communicate(timeout=30)
    stage.wait(timeout=30)
    assert not list(run.artifacts.glob("*"))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_one_clear_error_and_no_half_artifact(project, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], check=False)
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        full = tuneship("train", "tiny.toml", "--train.steps", "1", "--run", small / "run", cwd=project)
        assert full.returncode == 1
        assert "the disk is full" in full.stderr
        assert "Traceback" not in full.stderr
        assert not list((small / "run" / "artifacts").glob("*"))
    finally:
        subprocess.run(["umount", small], check=True)
