"""The exported adapter, read as SGLang reads it (one rank, one alpha / rank), gives the logits of the trained one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tuneship.core import servable
from tuneship.core.recipe import Lora

torch = pytest.importorskip("torch")

TARGETS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
PLAIN = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
REWRITES: dict[str, dict[str, Any]] = {
    "rsLoRA, a root": {"use_rslora": True},
    "rsLoRA, no root": {"use_rslora": True, "r": 12, "lora_alpha": 5},
    "ranks alone, alpha with them": {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 16}},
    "ranks": {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.\w+": 9}},
    "alphas, by powers of two": {"alpha_pattern": {"q_proj": 2, "v_proj": 32, "mlp.down_proj": 4}},
    "alphas": {"alpha_pattern": {"q_proj": 3, "v_proj": 7.5}},
    "both, and rsLoRA": {"use_rslora": True, "rank_pattern": {"v_proj": 6}, "alpha_pattern": {"up_proj": 3}},
    # PEFT takes the first that fits, and sorts them when it saves: what it would load again has another scaling.
    "two that fit": {"alpha_pattern": {"q_proj": 2, "layers.0.self_attn.q_proj": 16}},
}
TO_THE_BIT = {"rsLoRA, a root", "ranks alone, alpha with them", "alphas, by powers of two", "two that fit"}


def base(path: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def trained_with(path: Path, dtype=torch.float32, **config: Any):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(base(path), LoraConfig(**PLAIN | config)).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
            parameter.data = parameter.data.to(dtype)
    return model


def lora_layers(model) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {name: layer for name, layer in model.base_model.model.named_modules() if isinstance(layer, LoraLayer)}


def logits(model):
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


@pytest.mark.parametrize("name", REWRITES)
def test_the_exported_adapter_gives_the_logits_of_the_trained_one(tiny_model: Path, tmp_path: Path, name: str):
    from peft import PeftModel

    from tuneship.train.export import save_adapter

    trained = trained_with(tiny_model, **REWRITES[name])
    config = save_adapter(trained, tmp_path)
    assert config == json.loads((tmp_path / "adapter_config.json").read_text())
    assert {file.name for file in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert not servable.needs_folding(config), "a server would have to make a copy of it"
    assert not servable.unserved(config)
    assert config["target_modules"] == TARGETS

    # As SGLang reads it: every tensor of rank r, all scaled by alpha / r.
    as_served = PeftModel.from_pretrained(base(tiny_model), tmp_path).eval()
    for layer in lora_layers(as_served).values():
        assert layer.scaling["default"] == config["lora_alpha"] / config["r"]
        assert layer.r["default"] == config["r"]
    wanted = logits(trained)
    torch.testing.assert_close(logits(as_served), wanted, rtol=0, atol=1e-5)
    assert (logits(base(tiny_model)) - wanted).abs().max() > 0.1, "the adapter changes nothing"


@pytest.mark.parametrize("name", REWRITES)
def test_the_products_are_the_trained_ones_to_the_bit_or_to_float32(tiny_model: Path, tmp_path: Path, name: str):
    """Of bfloat16 tensors: a quotient that is a power of two costs nothing, not even a wider dtype."""
    from safetensors.torch import load_file

    from tuneship.train.export import save_adapter

    trained = trained_with(tiny_model, dtype=torch.bfloat16, **REWRITES[name])
    config = save_adapter(trained, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    exact = name in TO_THE_BIT or ("alpha_pattern" not in REWRITES[name] and "rank_pattern" not in REWRITES[name])
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16 if exact else torch.float32}
    for module, layer in lora_layers(trained).items():
        a, b = (tensors[f"base_model.model.{module}.lora_{half}.weight"].double() for half in "AB")
        was_a, was_b = (getattr(layer, f"lora_{half}")["default"].weight.double() for half in "AB")
        rank = was_a.shape[0]
        assert a.shape[0] == b.shape[1] == config["r"]
        assert torch.equal(a[:rank], was_a)
        assert not a[rank:].any()
        assert not b[:, rank:].any()
        served, wanted = b[:, :rank] * (config["lora_alpha"] / config["r"]), was_b * layer.scaling["default"]
        torch.testing.assert_close(served, wanted, rtol=1e-15 if exact else 6e-8, atol=0)


def test_rslora_says_the_same_as_alpha_over_rank(tiny_model: Path, tmp_path: Path):
    from peft import get_peft_model

    from tuneship.train.export import save_adapter
    from tuneship.train.model import lora_config

    model = base(tiny_model)
    trained = get_peft_model(model, lora_config(Lora(rank=12, alpha=5, rslora=True), model))
    config = save_adapter(trained, tmp_path)
    assert config["use_rslora"] is False
    assert servable.scaling(config) == pytest.approx(5 / math.sqrt(12), rel=1e-15)


@pytest.mark.filterwarnings("ignore:.*use_dora")
@pytest.mark.parametrize("own", [{}, {"use_dora": True}], ids=["plain LoRA", "DoRA"])
def test_what_needs_no_rewriting_or_knows_none_is_written_as_peft_writes_it(
    tiny_model: Path, tmp_path: Path, own: dict
):
    from tuneship.train.export import save_adapter

    trained = trained_with(tiny_model, **own, **({"alpha_pattern": {"q_proj": 2}} if own else {}))
    trained.save_pretrained(tmp_path / "peft")
    save_adapter(trained, tmp_path / "ours")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "peft" / name).read_bytes()


def test_the_base_s_embeddings_are_not_copied_into_an_adapter_of_the_head(tiny_model: Path, tmp_path: Path):
    from safetensors import safe_open

    from tuneship.train.export import save_adapter

    save_adapter(trained_with(tiny_model, target_modules=["lm_head", "q_proj"]), tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        assert all(".lora_" in key for key in file.keys())  # noqa: SIM118 - it is no dictionary
