"""Bytes from headers: the figures that SGLang allocated are in tests/integration/test_plan_memory.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tuneship.core.errors import ArtifactError, PlanError
from tuneship.core.shape import Shape
from tuneship.serve import footprint

SMOLLM2 = Shape(hidden=576, intermediate=1536, layers=30, heads=9, kv_heads=3, head_dim=64, vocab=49152, tied=True)
CONFIG = {
    "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 100, "max_position_embeddings": 64,
}  # fmt: skip
WEIGHTS = {
    "model.embed_tokens.weight": (100, 8),
    "model.layers.0.mlp.down_proj.weight": (8, 12),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.self_attn.q_proj.bias": (8,),
    "model.norm.weight": (8,),
    "lm_head.weight": (100, 8),
}
MATRICES = 8 * 12 + 8 * 8
PADDED = 128 * 8
"""SGLang rounds 100 rows up to 128."""


def write(folder: Path, **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file({name: np.zeros(shape, np.float16) for name, shape in WEIGHTS.items()}, folder / "model.safetensors")
    return folder


def test_sixteen_bits_are_all_values_and_the_padding(tmp_path: Path):
    facts = footprint.read(write(tmp_path / "model"))
    assert footprint.weights_bytes(facts, "none", 2) == 2 * (MATRICES + 2 * PADDED + 8 + 8)
    assert footprint.weights_bytes(facts, "none", 4) == 2 * footprint.weights_bytes(facts, "none", 2)
    assert facts.context_length == 64


def test_a_tied_head_is_counted_once(tmp_path: Path):
    facts = footprint.read(write(tmp_path / "model", tie_word_embeddings=True))
    assert facts.others == PADDED + 8 + 8


def test_only_matrices_of_layers_shrink(tmp_path: Path):
    facts = footprint.read(write(tmp_path / "model"))
    others = 2 * (2 * PADDED + 8 + 8)
    # Two matrices: maps of 16 and 256 values, one scale per 64 values in 8 bits, one per 256 of them in 32, one mean.
    assert footprint.weights_bytes(facts, "nf4", 2) == others + MATRICES // 2 + (2 + 1) + 2 * (64 + 1024 + 4 + 2)
    assert footprint.weights_bytes(facts, "nf4", 2, double=False) == others + MATRICES // 2 + 4 * (2 + 1) + 2 * 64
    assert footprint.weights_bytes(facts, "fp8", 2) == others + MATRICES + 4 * (8 + 8)


def test_weights_that_are_packed_otherwise_stay_as_they_are(tmp_path: Path):
    facts = footprint.read(write(tmp_path / "model", quantization_config={"quant_method": "awq"}))
    assert facts.stored == "awq"
    assert footprint.weights_bytes(facts, "none", 2) == facts.stored_bytes


def test_slots_and_tokens_are_those_that_were_measured():
    assert 9 * footprint.slot_bytes(SMOLLM2, 64, 2) == 351_682_560
    assert 20_001 * footprint.kv_bytes_per_token(SMOLLM2, 2) == 460_823_040


@pytest.mark.parametrize(
    "config",
    [{"num_local_experts": 8}, {"kv_lora_rank": 512}, {"layer_types": ["full_attention", "linear_attention"]}],
    ids=lambda config: next(iter(config)),
)
def test_pools_of_another_shape_are_refused_by_name(tmp_path: Path, config: dict):
    with pytest.raises(PlanError, match=r"num_local_experts|kv_lora_rank|linear_attention"):
        footprint.read(write(tmp_path / "model", **config))


def test_no_weights_are_no_footprint(tmp_path: Path):
    (write(tmp_path / "model") / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"no \*\.safetensors"):
        footprint.read(tmp_path / "model")
