"""`serve.mode = "auto"` the whole way, on a machine that has room for nothing but the adapter on its NF4 base."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tuneship.core import recipe_file
from tuneship.core.report import read_report
from tuneship.core.rundir import RunDir

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(400)]

RECIPE = """
name = "auto"
[model]
id = "{model}"
[data]
train = "rows.jsonl"
max_length = 64
[lora]
rank = 4
[train]
effective_batch = 4
steps = 2
optimizer = "adamw"
[serve]
mode = "auto"
max_loras = 1
max_rank = 4
port = 0
[bench.load]
rates = [2]
duration_s = 2
input_tokens = 8
output_tokens = 4
"""
UP = """
import sys
from tuneship.serve import plan
# Room for the packed weights, the slots and the tokens that are wanted, and no more: only the decision sees it.
plan._cpu = lambda machine: plan._Room(machine.memory_bytes, {room}, 0, 0, "a test's")
from tuneship.cli.app import app
app(sys.argv[1:], result_action="return_value")
"""


@pytest.fixture
def project(tiny_model: Path, tmp_path: Path) -> Path:
    (tmp_path / "auto.toml").write_text(RECIPE.format(model=tiny_model))
    rows = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "as you wish"}]}
        for i in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def up(project: Path, room: int, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-c", UP.format(room=room), "up", "auto.toml", *words]
    return subprocess.run(argv, cwd=project, capture_output=True, text=True, timeout=350, check=False)


def test_the_adapter_on_the_nf4_base(project: Path, tiny_model: Path, tmp_path: Path, monkeypatch):
    from tuneship.serve import footprint

    monkeypatch.setenv("TUNESHIP_CACHE", str(tmp_path / "cache"))
    facts = footprint.read(tiny_model)
    kv = 8 * 64 * footprint.kv_bytes_per_token(facts.shape, 2)
    packed = footprint.weights_bytes(facts, "nf4", 2) + 2 * footprint.slot_bytes(facts.shape, 4, 2) + kv
    assert packed < footprint.weights_bytes(facts, "none", 2) + kv, "merged fits as well"
    done = up(project, packed)
    assert done.returncode == 0, done.stderr
    assert "serve.mode = auto: as an adapter on the NF4 base: merged, " in done.stderr

    run = RunDir(project / "runs" / "auto")
    serve = recipe_file.load(run.recipe).serve
    assert (serve.mode, serve.quantization) == ("adapters", "nf4")
    record = json.loads((run.path / "plan.json").read_text())["serve"]
    assert (record["asked"], record["mode"], record["quantization"]) == ("auto", "adapters", "nf4")
    assert "--enable-lora" in " ".join(read_report(run.report).testbed.flags)
    assert not list(run.artifacts.glob("merged-*"))

    refused = up(project, packed // 2, "--run", "runs/other")
    assert refused.returncode == 1
    assert "are wanted" in refused.stderr
    assert not list((project / "runs" / "other").glob("artifacts/*")), "it trained before it was refused"
