"""The same model, wider by zeros: for kernels that do not take its sizes.

    write(Path("models/smollm2"), Path("wider"), multiple=128)      # 9 heads, 576 values -> 12 heads, 768 values

Whole groups of heads are added until `multiple` divides the hidden size, for layouts like Llama's without biases. What
is new reads zeros and writes zeros. RMSNorm's mean is over more values then, which its weights and its epsilon make up
for: the answers are the same but for rounding.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def write(model: Path, out: Path, multiple: int) -> Path:
    """Copy the checkpoint at `model` to `out`, its hidden size the next one that `multiple` divides; returns `out`."""
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    wider = _wider(config, multiple)
    added = {name: wider[name] - config[name] for name in ("hidden_size", "num_key_value_heads", "num_attention_heads")}
    tensors = {key: tensor for file in sorted(model.glob("*.safetensors")) for key, tensor in load_file(file).items()}
    padded = {key: _padded(key.split(".")[-2], tensor, added) for key, tensor in tensors.items()}
    save_file(padded, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config | wider, indent=1), encoding="utf-8")
    return out


def _wider(config: dict[str, Any], multiple: int) -> dict[str, Any]:
    """What of the configuration is another."""
    heads, keys, hidden = config["num_attention_heads"], config["num_key_value_heads"], config["hidden_size"]
    times = next(n for n in range(keys, keys + 10 * multiple) if hidden * n % (keys * multiple) == 0)
    return {
        "hidden_size": hidden * times // keys,
        "num_attention_heads": heads * times // keys,
        "num_key_value_heads": times,
        "rms_norm_eps": config["rms_norm_eps"] * keys / times,
    }


def _padded(module: str, tensor: torch.Tensor, added: dict[str, int]) -> torch.Tensor:
    """Zeros below and to the right: of as many hidden values, queries, or keys as there are more."""
    hidden, keys = added["hidden_size"], added["num_key_value_heads"]
    if module.endswith("norm"):
        (size,) = tensor.shape
        return torch.nn.functional.pad(tensor.float() * math.sqrt(size / (size + hidden)), (0, hidden))
    queries = hidden  # a head's size is the hidden one through the number of heads
    head = queries // added["num_attention_heads"] if hidden else 0
    below = {"q_proj": queries, "k_proj": keys * head, "v_proj": keys * head, "o_proj": hidden, "down_proj": hidden}
    right = {"o_proj": queries, "down_proj": 0}
    return torch.nn.functional.pad(tensor, (0, right.get(module, hidden), 0, below.get(module, 0)))
