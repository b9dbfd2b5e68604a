"""What Unsloth is told; that it runs needs a GPU and an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata

import pytest
import torch

from tuneship.core.errors import TrainError
from tuneship.core.hardware import Hardware
from tuneship.core.recipe import Recipe
from tuneship.core.shape import Shape
from tuneship.train.data.template import Encoded
from tuneship.train.elsewhere import unsloth_backend
from tuneship.train.planning import plan

PROGRAM = """
import json, sys
job = json.load(open(sys.argv[1]))
rows = [json.loads(line) for line in open(job["rows"])]
import os
os.mkdir(job["out"])
result = {"peak_bytes": 7, "versions": {"unsloth": "1.2.3"}, "attention": {"implementation": "sdpa"}}
json.dump(result, open(job["out"] + "/result.json", "w"))
json.dump(job | {"read": rows}, open(job["out"] + "/seen.json", "w"))
"""


@pytest.fixture
def recipe(tiny_model):
    sections = {"data": {"train": "t"}, "lora": {"rank": 8, "rslora": True}, "train": {"warmup": 0.5, "steps": 4}}
    return Recipe.model_validate({"model": {"id": str(tiny_model)}, **sections})


@pytest.fixture
def todo(recipe):
    shape = Shape(64, 128, 2, 4, 2, 16, 90, tied=True)
    return plan.make(recipe, shape, Hardware((), "", "cpu", 2, 2**34), rows=2, tokens=5, longest=3)


def test_without_a_gpu_it_is_refused(tiny_model, recipe, todo, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    with pytest.raises(TrainError, match="needs a CUDA device"):
        unsloth_backend.fit(tiny_model, 0, [Encoded([1], [1])], recipe, todo, tmp_path)


def test_the_program_is_told_everything_the_recipe_says(tiny_model, recipe, todo, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setattr(unsloth_backend, "_PROGRAM", tmp_path / "program.py")
    rows = [Encoded([1, 2, 3], [-100, 2, 3]), Encoded([4, 5], [4, 5])]
    made = unsloth_backend.fit(tiny_model, 9, rows, recipe, todo, tmp_path, interpreter=sys.executable)
    assert (made.peak_bytes, made.versions) == (7, {"unsloth": "1.2.3"})
    assert made.attention == {"implementation": "sdpa"}
    seen = json.loads((made.adapter / "seen.json").read_text())
    assert seen["read"] == [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4, 5], "labels": [4, 5]}]
    assert seen["lora"] == {
        "rank": 8,
        "alpha": 32,
        "dropout": 0.0,
        "rslora": True,
        "modules": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
    }
    assert (seen["micro_batch"], seen["accumulation"], seen["steps"], seen["warmup_steps"]) == (16, 1, 4, 2)
    assert (seen["pad_id"], seen["length"], seen["base"]) == (9, 3, str(tiny_model))


ASKING = """
import json, sys
sys.path.insert(0, sys.argv[1])
import unsloth_trainer
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], attn_implementation="eager")
print(json.dumps([unsloth_trainer._versions(), unsloth_trainer._attention(model)]))
"""


def test_the_program_says_what_its_own_environment_has(tiny_model, tmp_path):
    """Unsloth is a name on a path here; versions are of what is found beside it, kernels are those that load."""
    for name, version, code in (
        ("unsloth", "1.2.3", "FastLanguageModel = None"),
        ("xformers", "4.5.6", ""),
        ("flash_attn", "7.8.9", "raise OSError('undefined symbol: built for another torch')"),
    ):
        (tmp_path / f"{name}.py").write_text(code)
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    program = [sys.executable, "-c", ASKING, unsloth_backend._PROGRAM.parent, tiny_model]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    versions, attention = json.loads(done.stdout)
    assert (versions["unsloth"], versions["xformers"], versions["flash-attn"]) == ("1.2.3", "4.5.6", "7.8.9")
    assert versions["torch"] == metadata.version("torch")
    assert "unsloth_zoo" not in versions
    assert attention == {"implementation": "eager", "importable": ["xformers"]}
