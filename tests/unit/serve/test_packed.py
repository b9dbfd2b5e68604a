"""Packed weights that SGLang's kernels do not take are refused by the layer's name, before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.serve.raw_tensors import write_raw
from tuneship.core.errors import ArtifactError, PreflightError
from tuneship.core.hardware import Gpu, Hardware
from tuneship.core.recipe import Serve
from tuneship.serve import packed
from tuneship.serve.catalog import Catalog, Entry
from tuneship.serve.launch import configure
from tuneship.serve.preflight.base import linear

H100 = Hardware((Gpu("NVIDIA H100", 80 << 30, (9, 0)),), "580", "a processor", 16, 128 << 30)


def decoder(hidden: int, keys: int, inner: int, heads: int = 0) -> dict[str, tuple[int, int]]:
    """{module: (out, in)} of one layer, and a head that stays as it is."""
    queries = heads or hidden
    sizes = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    return {f"model.layers.0.{name}": size for name, size in sizes.items()} | {"lm_head": (1001, hidden)}


@pytest.mark.parametrize(
    "sizes",
    [(1536, 256, 8960), (896, 128, 4864), (2048, 512, 8192), (3584, 512, 18944), (640, 192, 1536, 576)],
    ids=["qwen2.5-1.5b", "qwen2.5-0.5b", "llama-3.2-1b", "qwen2.5-7b", "smollm2-135m, wider"],
)
def test_what_fits(sizes: tuple[int, ...]):
    packed.require(decoder(*sizes))


@pytest.mark.parametrize(
    ("sizes", "layer"),
    [((576, 192, 1536), "qkv_proj is 960 x 576"), ((960, 320, 2560), "qkv_proj is 1600 x 960")],
    ids=["smollm2-135m", "smollm2-360m"],
)
def test_what_does_not(sizes: tuple[int, ...], layer: str):
    """The first one ended SGLang 0.5.17 on an H200: Invalid thread config ... for MKN = [8192, 576, 960]."""
    with pytest.raises(PreflightError, match=rf"^model\.layers\.0\.self_attn\.{layer}, and SGLang's kernels"):
        packed.require(decoder(*sizes))


def test_over_several_gpus_each_part_has_to_fit():
    packed.require(decoder(896, 128, 4864), tensor_parallel="2")
    with pytest.raises(PreflightError, match="qkv_proj is 164 x 896 on each of 7 GPUs"):
        packed.require(decoder(896, 128, 4864), tensor_parallel="7")
    with pytest.raises(PreflightError, match="down_proj is 896 x 608 on each of 8 GPUs"):
        packed.require({"model.layers.0.mlp.down_proj": (896, 4864)}, tensor_parallel="8")


def write_packed(folder: Path, sizes: dict[str, tuple[int, ...]]) -> Path:
    folder.mkdir(exist_ok=True)
    write_raw(
        {
            f"{module}.weight_shape": {"dtype": "I64", "shape": [len(size)], "data": _raw(size)}
            for module, size in sizes.items()
        },
        folder / "model.safetensors",
    )
    return folder


def _raw(size: tuple[int, ...]) -> bytes:
    return b"".join(side.to_bytes(8, "little") for side in size)


def test_a_server_of_it_is_not_started(tmp_path: Path):
    path = write_packed(tmp_path / "packed", decoder(576, 192, 1536))
    catalog = Catalog("base", (Entry("b", "b@1", None, path, "", "b"),), packed.METHOD)
    with pytest.raises(PreflightError, match="qkv_proj is 960 x 576") as caught:
        configure(Serve(), catalog, H100, 1)
    assert "serve the original" in caught.value.hint
    write_packed(path, decoder(1536, 256, 8960))
    assert configure(Serve(), catalog, H100, 1).quantization == "none"


def test_what_is_read_is_what_was_packed(tmp_path: Path):
    sizes = decoder(1536, 256, 8960)
    path = write_packed(tmp_path, sizes)
    assert packed.matrices(path) == linear(path) == sizes


def test_a_shape_that_is_none(tmp_path: Path):
    with pytest.raises(ArtifactError, match="no pair of integers"):
        packed.matrices(write_packed(tmp_path, {"a": (1, 2, 3)}))
