"""A base and adapters as files alone: enough for every check that happens before an engine starts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tuneship.core import artifact, checkpoint
from tuneship.core.artifact import Artifact, LoraRecord, Manifest, QuantizationRecord, TemplateRecord
from tuneship.core.errors import PreflightError
from tuneship.core.files import sha256_text
from tuneship.core.model_source import ModelSource
from tuneship.serve import preflight
from tuneship.serve.preflight import BaseModel, CheckedAdapter, Limits

HIDDEN, KEYS, INNER, LAYERS, VOCABULARY = 8, 4, 12, 2, 16
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
"""Of one decoder layer: {module: (out, in)}."""

MakeAdapter = Callable[..., Path]
SealAdapter = Callable[..., Artifact]
Check = Callable[..., CheckedAdapter]
Refusal = Callable[..., PreflightError]
LIMITS = Limits()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Copies of adapters are not left in the user's cache."""
    monkeypatch.setenv("TUNESHIP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A checkpoint folder with one real weight, a tokenizer and a chat template."""
    return write_base(tmp_path / "base", seed=0)


@pytest.fixture
def make_adapter(tmp_path: Path) -> MakeAdapter:
    """Factory (name, `write_adapter`'s options) -> a plain PEFT directory in `adapters/`."""

    def make(name: str, **options: Any) -> Path:
        return write_adapter(tmp_path / "adapters" / name, **options)

    return make


@pytest.fixture
def seal_adapter(tmp_path: Path, base: Path) -> SealAdapter:
    """Factory (name, base=..., template=..., kind=...) -> an artifact in `artifacts/`, made for the base."""

    def seal(name: str, *, made_for: Path = base, template: str | None = None, kind: str = "adapter") -> Artifact:
        with artifact.draft(tmp_path / "artifacts") as work:
            if kind == "adapter":
                write_adapter(work, config={"revision": name})
            else:
                write_base(work, seed=len(name))
            return artifact.seal(work, manifest(name, made_for, template, kind))

    return seal


@pytest.fixture
def facts(base: Path) -> BaseModel:
    return preflight.read_base(ModelSource("the-base", "", base))


@pytest.fixture
def check(facts: BaseModel) -> Check:
    """(path, limits) -> the checked adapter."""
    return lambda path, limits=LIMITS: preflight.check(path, facts, limits)


@pytest.fixture
def refusal(check: Check) -> Refusal:
    """(path, limits) -> the error that refused it."""

    def refuse(path: Path, limits: Limits = LIMITS) -> PreflightError:
        with pytest.raises(PreflightError) as caught:
            check(path, limits)
        assert caught.value.hint
        return caught.value

    return refuse


def write_base(path: Path, seed: int) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    shapes = {f"model.layers.{n}.{module}": shape for n in range(LAYERS) for module, shape in SHAPES.items()}
    shapes |= {"model.embed_tokens": (VOCABULARY, HIDDEN), "lm_head": (VOCABULARY, HIDDEN), "model.norm": (HIDDEN,)}
    weights = {f"{name}.weight": draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(weights, path / "model.safetensors")
    (path / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLM"], "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY})
    )
    (path / "tokenizer.json").write_text("{}")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    return path


def write_adapter(
    path: Path,
    *,
    rank: int = 4,
    modules: Sequence[str] = ("self_attn.q_proj", "self_attn.v_proj"),
    config: Mapping[str, Any] | None = None,
    change: Callable[[dict[str, np.ndarray]], object] = lambda _tensors: None,
) -> Path:
    """A PEFT directory with random values; `config` is laid over its settings, `change` edits its tensors in place."""
    path.mkdir(parents=True, exist_ok=True)
    targets = [module.rpartition(".")[2] for module in modules]
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": targets}
    (path / "adapter_config.json").write_text(json.dumps({**settings, **(config or {})}))
    draw, tensors = np.random.default_rng(0), {}
    for layer in range(LAYERS):
        for module in modules:
            rows, columns = SHAPES[module]
            key = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{key}.lora_A.weight"] = draw.normal(size=(rank, columns)).astype(np.float32)
            tensors[f"{key}.lora_B.weight"] = draw.normal(size=(rows, rank)).astype(np.float32)
    change(tensors)
    save_file(tensors, path / "adapter_model.safetensors")
    return path


def manifest(name: str, made_for: Path, template: str | None, kind: str) -> Manifest:
    text = checkpoint.chat_template(made_for) if template is None else template
    return Manifest(
        kind=kind,
        input_id="0" * 64,
        name=name,
        base=checkpoint.identify(made_for, "the-base", "main"),
        quantization=QuantizationRecord(method="none", double=False, compute_dtype="float32"),
        lora=LoraRecord(rank=4, alpha=8, scaling=2, rslora=False, target_modules=("q_proj", "v_proj")),
        template=TemplateRecord(text=text, sha256=sha256_text(text), source="model"),
        end_token_ids=(2,),
        tokenizer_sha256=checkpoint.tokenizer_sha256(made_for),
    )
