"""An adapter rewritten to one rank and one scaling: each product B A is the one that it was, bit for bit."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tuneship.core import even
from tuneship.core.servable import Folding

MODULES = {"model.layers.0.mlp.up_proj": 2, "model.layers.0.mlp.down_proj": 4}


def adapter(tmp_path, dtype: torch.dtype):
    """(file, {name: tensor}) of two modules of ranks 2 and 4."""
    torch.manual_seed(0)
    tensors = {}
    for module, rank in MODULES.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, 8).to(dtype)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(6, rank).to(dtype)
    file = tmp_path / "adapter_model.safetensors"
    save_file(tensors, file)
    return file, tensors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("factor", "stays"), [(1.0, True), (0.25, True), (1.1, False)], ids=["same", "a power of two", "no power of two"]
)
def test_every_product_is_as_it_was(tmp_path, dtype: torch.dtype, factor: float, stays: bool):
    file, before = adapter(tmp_path, dtype)
    folding = Folding({"r": 4}, dict.fromkeys(MODULES, 1.0) | {"model.layers.0.mlp.up_proj": factor})
    assert even.changes(folding, MODULES)
    even.rewrite(file.read_bytes(), folding, tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as out:
        after = {name: out.get_tensor(name) for name in out.keys()}  # noqa: SIM118 - no dictionary
    # In 16 bits only what they hold exactly; else float32, in which a factor is rounded once.
    wanted = dtype if stays else torch.float32
    assert {tensor.dtype for tensor in after.values()} == {wanted}
    for module, rank in MODULES.items():
        a, b = (f"base_model.model.{module}.lora_{side}.weight" for side in "AB")
        assert after[a].shape == (4, 8)
        assert after[b].shape == (6, 4)
        assert torch.equal(after[a][:rank].float(), before[a].float())
        scaled = (before[b].double() * folding.factors[module]).float()
        assert torch.equal(after[b][:, :rank].float(), scaled)
        assert not after[a][rank:].any()
        assert not after[b][:, rank:].any()


def test_what_is_even_already_needs_no_rewriting():
    assert not even.changes(Folding({"r": 4}, {"m": 1.0}), {"m": 4})
    assert even.changes(Folding({"r": 4}, {"m": 0.5}), {"m": 4})


def test_only_pairs_can_be_rewritten(tmp_path):
    file, tensors = adapter(tmp_path, torch.float32)
    assert even.is_pairs(file.read_bytes())
    save_file(tensors | {"base_model.model.lm_head.weight": torch.zeros(2, 2)}, file)
    assert not even.is_pairs(file.read_bytes())
