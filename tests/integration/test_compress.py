"""`merge.quantize`: llm-compressor in an environment of its own, and what it wrote held against the trained model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tuneship.core.artifact import open_artifact
from tuneship.core.parity import Parity, read_reference

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1800)]

RECIPE = """
name = "tiny"
[model]
id = "{model}"
dtype = "bfloat16"
[data]
train = "rows.jsonl"
heldout = "rows.jsonl"
[lora]
rank = 8
[train]
effective_batch = 8
steps = 12
learning_rate = 5e-3
optimizer = "adamw"
"""


@pytest.fixture(scope="module")
def project(tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    (folder / "tiny.toml").write_text(RECIPE.format(model=tiny_model))
    turns = [(f"count {i}", f"the total is {i}") for i in range(48)]
    rows = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in turns]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return folder


def merge(project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tuneship", "up", "tiny.toml", "--until", "merge", *words]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=1700, check=False)


@pytest.mark.parametrize(("scheme", "width"), [("fp8", 8), ("w4a16", 4)])
def test_the_checkpoint_in_fewer_bits_has_a_parity_of_its_own(project, scheme: str, width: int):
    done = merge(project, "--merge.quantize", scheme, "--merge.max_nll_increase", "1")
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    open_artifact(path, kind="merged")
    first, second = (Parity.model_validate_json((path / f"evidence/parity-{n}.json").read_text()) for n in (1, 2))
    print(f"\n{scheme}: {first.nll_reference:.4f} trained, {first.nll:.4f} in 16 bits, {second.nll:.4f} compressed")
    assert second.candidate == f"merged ({first.merged_into}), {scheme}"
    assert second.kl_mean > first.kl_mean, "fewer bits changed nothing"
    assert second.nll < second.nll_base - 1, "it is no tuned model any more"

    config = json.loads((path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert config["config_groups"]["group_0"]["weights"]["num_bits"] == width
    assert config["ignore"] == ["lm_head"]
    assert json.loads((path / "generation_config.json").read_text())["eos_token_id"] == [2]
    assert not (path / "recipe.yaml").exists()
    stored = [row.merged for row in read_reference(path / "evidence")]
    assert stored == [pytest.approx(row, abs=0.05) for row in replayed(path)]


def test_what_lost_too_much_is_not_sealed(project):
    before = set((project / "runs/tiny/artifacts").iterdir())
    done = merge(project, "--merge.quantize", "w4a16", "--merge.max_nll_increase", "0", "--merge.base", "dequantized")
    assert done.returncode == 1
    assert "nats per token worse than the trained one (limit 0.0" in done.stderr
    assert set((project / "runs/tiny/artifacts").iterdir()) == before


def replayed(path: Path) -> list[list[float]]:
    """What the sealed checkpoint says to the evidence's rows: `verify` replays what was stored."""
    import torch

    from tuneship.core.recipe import Model
    from tuneship.train.model import load_base

    model = load_base(path, Model(id="tiny", dtype="bfloat16"))
    found = []
    for row in read_reference(path / "evidence"):
        ids = torch.tensor([row.input_ids])
        with torch.inference_mode():
            log_p = model(ids).logits.float().log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None]).squeeze(-1)
        found.append([0.0, *log_p.tolist()])
    return found
