"""A base and adapters as files alone: enough for every check that happens before an engine starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tuneship.core import artifact, checkpoint
from tuneship.core.artifact import Artifact, LoraRecord, Manifest, QuantizationRecord, TemplateRecord
from tuneship.core.files import sha256_text

HIDDEN = 8
MODULE = "model.layers.0.self_attn.q_proj"

MakeAdapter = Callable[..., Path]
SealAdapter = Callable[..., Artifact]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A checkpoint folder with one real weight, a tokenizer and a chat template."""
    return write_base(tmp_path / "base", seed=0)


@pytest.fixture
def make_adapter(tmp_path: Path) -> MakeAdapter:
    """Factory (name, rank=4, config={...}, hidden=8) -> a plain PEFT directory in `adapters/`."""

    def make(
        name: str, *, rank: int = 4, hidden: int = HIDDEN, module: str = MODULE, config: dict | None = None
    ) -> Path:
        return write_adapter(tmp_path / "adapters" / name, rank, hidden, module, config or {})

    return make


@pytest.fixture
def seal_adapter(tmp_path: Path, base: Path) -> SealAdapter:
    """Factory (name, base=..., template=..., kind=...) -> an artifact in `artifacts/`, made for the base."""

    def seal(name: str, *, made_for: Path = base, template: str | None = None, kind: str = "adapter") -> Artifact:
        with artifact.draft(tmp_path / "artifacts") as work:
            if kind == "adapter":
                write_adapter(work, 4, HIDDEN, MODULE, {"seed_of_identity": name})
            else:
                write_base(work, seed=len(name))
            return artifact.seal(work, manifest(name, made_for, template, kind))

    return seal


def write_base(path: Path, seed: int) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    weight = np.random.default_rng(seed).normal(size=(HIDDEN, HIDDEN)).astype(np.float32)
    save_file({f"{MODULE}.weight": weight}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    (path / "tokenizer.json").write_text("{}")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    return path


def write_adapter(path: Path, rank: int, hidden: int, module: str, config: dict) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": [module.rpartition(".")[2]]}
    (path / "adapter_config.json").write_text(json.dumps(settings | config))
    pair = {"lora_A": np.zeros((rank, hidden), np.float32), "lora_B": np.zeros((hidden, rank), np.float32)}
    save_file(
        {f"base_model.model.{module}.{half}.weight": value for half, value in pair.items()},
        path / "adapter_model.safetensors",
    )
    return path


def manifest(name: str, made_for: Path, template: str | None, kind: str) -> Manifest:
    text = checkpoint.chat_template(made_for) if template is None else template
    return Manifest(
        kind=kind,
        input_id="0" * 64,
        name=name,
        base=checkpoint.identify(made_for, "the-base", "main"),
        quantization=QuantizationRecord(method="none", double=False, compute_dtype="float32"),
        lora=LoraRecord(rank=4, alpha=8, scaling=2, rslora=False, target_modules=("q_proj",)),
        template=TemplateRecord(text=text, sha256=sha256_text(text), source="model"),
        end_token_ids=(2,),
        tokenizer_sha256=checkpoint.tokenizer_sha256(made_for),
    )
