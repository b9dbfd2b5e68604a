"""`train.backend = "unsloth"` the whole way on a CUDA device: its adapter is sealed with evidence as every other.

Not run where there is none, and said so. uv builds Unsloth's environment when it is not there yet.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tuneship.core.artifact import open_artifact
from tuneship.core.hardware import detect
from tuneship.serve.verify import read_evidence

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not detect().gpus, reason="NOT RUN: this machine has no CUDA device"),
]

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.toml"


def test_an_adapter_of_unsloth_is_one_of_ours(tmp_path: Path) -> None:
    losses = {}
    for backend in ("trl", "unsloth"):
        run = tmp_path / backend
        argv = [sys.executable, "-m", "tuneship", "train", str(RECIPE), "--run", str(run), "--train.backend", backend]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stderr
        lines = (run / "stages" / "train" / "attempt-1" / "metrics.jsonl").read_text().splitlines()
        losses[backend] = [json.loads(line)["loss"] for line in lines]
        sealed = open_artifact(next(run.glob("artifacts/adapter-*")), kind="adapter")
        assert len(read_evidence(sealed.evidence)) == 16
        assert sorted(file.name for file in sealed.path.glob("adapter*")) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
    assert len(losses["unsloth"]) == len(losses["trl"])
    assert losses["unsloth"][-1] < 0.5 * losses["unsloth"][0]
    assert losses["unsloth"][-1] == pytest.approx(losses["trl"][-1], abs=0.1)
