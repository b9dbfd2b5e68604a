"""Merging takes the memory of one shard and 2 GB, whatever the size of the model: here 3 GB in six shards."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.layer_shapes import layer_matrices
from tuneship.core import tensor_file
from tuneship.core.tensor_file import Slot

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1800)]

HIDDEN, INNER, LAYERS, VOCABULARY, RANK = 2048, 5632, 28, 32_000, 16
SHARD_BYTES = 512 * 10**6
ALLOWED_BYTES = 2 * 10**9
"""Beside the largest shard."""
MODULES = layer_matrices(HIDDEN, HIDDEN, INNER)


def random_tensors(slots: dict[str, Slot], scale: float) -> Iterator:
    import torch

    torch.manual_seed(0)
    dtypes = {"BF16": torch.bfloat16, "F32": torch.float32}
    for slot in slots.values():
        yield (scale * torch.randn(slot.shape)).to(dtypes[slot.dtype])


@pytest.fixture(scope="module")
def made(tiny_model: Path, tmp_path_factory) -> tuple[Path, Path]:
    """A base of 3 GB in bfloat16 and an adapter on all of its linear layers, written tensor by tensor."""
    from transformers import AutoTokenizer, LlamaConfig

    from tuneship.train.merging import shards

    base, adapter = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapter")
    layers = [f"model.layers.{n}" for n in range(LAYERS)]
    weights = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    weights |= {f"{layer}.{module}.weight": shape for layer in layers for module, shape in MODULES.items()}
    norms = [f"{layer}.{name}_layernorm.weight" for layer in layers for name in ("input", "post_attention")]
    weights |= dict.fromkeys([*norms, "model.norm.weight"], (HIDDEN,))
    slots = {key: Slot("BF16", shape) for key, shape in weights.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_BYTES", SHARD_BYTES)
        shards.write(base, slots, random_tensors(slots, 0.02))
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=16,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(base)

    pairs = {}
    for layer in layers:
        for module, (rows, columns) in MODULES.items():
            key = f"base_model.model.{layer}.{module}"
            pairs[f"{key}.lora_A.weight"] = Slot("F32", (RANK, columns))
            pairs[f"{key}.lora_B.weight"] = Slot("F32", (rows, RANK))
    data = (tensor.numpy() for tensor in random_tensors(pairs, 0.01))
    tensor_file.write(adapter / "adapter_model.safetensors", pairs, data)
    settings = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 32,
        "target_modules": sorted(m[m.index(".") + 1 :] for m in MODULES),
    }
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    return base, adapter


@pytest.mark.parametrize("onto", ["original", "dequantized"])
def test_the_peak_is_a_shard_and_two_gigabytes(made, tmp_path, onto: str):
    base, adapter = made
    largest = max(file.stat().st_size for file in base.glob("*.safetensors"))
    whole = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    program = Path(__file__).with_name("merge_peak.py")
    done = subprocess.run(
        [sys.executable, program, base, adapter, tmp_path, onto],
        capture_output=True, text=True, timeout=1700, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"\n{onto}: {whole / 1e9:.2f} GB in shards of {largest / 1e9:.2f}, peak {found}")
    assert whole > largest + ALLOWED_BYTES, "the whole model would fit: this tells nothing"
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) == pytest.approx(whole, rel=1e-4)
    assert found["peak_bytes"] < largest + ALLOWED_BYTES
