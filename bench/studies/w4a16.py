"""A W4A16 checkpoint in compressed-tensors' `pack-quantized` form, by rounding to nearest: to try servers with.

    write(Path("models/base"), Path("w4a16"))

Symmetric, one scale for 128 values of a row (64 where a row does not divide so), linear layers of the decoder alone.
Nothing is calibrated, so the model is worse than what llm-compressor would make; loading and speed are the same.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32  # type: ignore[import-untyped]
from safetensors.torch import load_file, save_file

_BITS, _LARGEST = 4, 7
_GROUPS = (128, 64)


def write(model: Path, out: Path) -> Path:
    """Copy the checkpoint at `model` to `out`, its decoder's matrices in 4 bits; returns `out`.

    Raises:
        ValueError: rows that no group size divides.

    """
    out.mkdir(parents=True)
    matrices = {key: tensor for key, tensor in _tensors(model).items() if _is_matrix(key, tensor)}
    group = _group(matrices.values())
    for file in sorted(model.glob("*.safetensors")):
        kept: dict[str, torch.Tensor] = {}
        for key, tensor in load_file(file).items():
            kept |= _packed(key.removesuffix(".weight"), tensor, group) if key in matrices else {key: tensor}
        save_file(kept, out / file.name, metadata={"format": "pt"})
    for file in model.iterdir():
        if file.is_file() and file.suffix in {".json", ".jinja", ".model"} and "index" not in file.name:
            shutil.copy(file, out)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": _config(group)}), encoding="utf-8")
    return out


def _tensors(model: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in sorted(model.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def _is_matrix(key: str, tensor: torch.Tensor) -> bool:
    return tensor.ndim == 2 and ".layers." in key and key.endswith(".weight")


def _group(matrices: Any) -> int:
    widths = {matrix.shape[1] for matrix in matrices}
    for group in _GROUPS:
        if all(width % group == 0 for width in widths):
            return group
    raise ValueError(f"rows of {sorted(widths)} values have no common group of {' or '.join(map(str, _GROUPS))}")


def _packed(name: str, weight: torch.Tensor, group: int) -> dict[str, torch.Tensor]:
    """The three tensors that stand for one matrix (out, in): codes (out, in / 8), scales (out, in / group), shape."""
    rows, columns = weight.shape
    blocks = weight.float().reshape(rows, columns // group, group)
    scales = (blocks.abs().amax(-1, keepdim=True) / _LARGEST).clamp(min=1e-8)
    codes = (blocks / scales).round().clamp(-_LARGEST - 1, _LARGEST).to(torch.int8).reshape(rows, columns)
    return {
        f"{name}.weight_packed": pack_to_int32(codes, _BITS),
        f"{name}.weight_scale": scales.squeeze(-1).to(torch.bfloat16),
        f"{name}.weight_shape": torch.tensor([rows, columns], dtype=torch.int64),
    }


def _config(group: int) -> dict[str, Any]:
    weights = {"num_bits": _BITS, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
