"""A model and adapters of a real shape with random weights, for studies of speed and memory: no download, no meaning.

    base = write_base("1.5b", folder / "base")            # Qwen2.5-1.5B's layers, with the bundled model's tokenizer
    write_adapter("1.5b", folder / "adapters" / "a0", seed=0)

The vocabulary is the bundled model's (49,152 instead of 151,936) unless another is asked for, because prompts must be
tokenized: the LM head is that much smaller than the real one's.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

from tuneship.core.model_source import BUNDLED_ID, resolve

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class Layers(NamedTuple):
    """A Qwen2 decoder's dimensions."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int


SHAPES = {
    "7b": Layers(3584, 18944, 28, 28, 4),
    "1.5b": Layers(1536, 8960, 28, 12, 2),
    "tiny": Layers(128, 256, 2, 2, 1),
}


def write_base(shape: str, path: Path, vocab: int = 0) -> Path:
    """A bf16 checkpoint at `path`, of `vocab` words (0: the tokenizer's); one that is there already is kept."""
    if path.exists():
        return path
    import torch  # noqa: PLC0415 - takes seconds
    from transformers import Qwen2Config, Qwen2ForCausalLM  # noqa: PLC0415

    size = SHAPES[shape]
    tokenizer = resolve(BUNDLED_ID).path
    config = Qwen2Config(
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        vocab_size=vocab or json.loads((tokenizer / "config.json").read_text(encoding="utf-8"))["vocab_size"],
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(path)
    for name in _TOKENIZER:
        shutil.copy(tokenizer / name, path)
    return path


def write_adapter(shape: str, path: Path, seed: int, rank: int = 16) -> Path:
    """A bf16 adapter on all linear layers of `shape`, as PEFT would save it."""
    import torch  # noqa: PLC0415 - as above
    from safetensors.torch import save_file  # noqa: PLC0415

    size = SHAPES[shape]
    hidden, inner, kv = size.hidden, size.intermediate, size.hidden // size.heads * size.kv_heads
    widths = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden, kv), "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (hidden, inner), "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(size.layers):
        for module, (wide_in, wide_out) in widths.items():
            key = f"base_model.model.model.layers.{layer}.{module}"
            for half, shaped in (("lora_A", (rank, wide_in)), ("lora_B", (wide_out, rank))):
                tensors[f"{key}.{half}.weight"] = torch.randn(shaped, generator=generator).mul_(0.01).bfloat16()
    path.mkdir(parents=True)
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0,
        "bias": "none", "target_modules": list(TARGETS), "base_model_name_or_path": "", "inference_mode": True,
    }  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return path
