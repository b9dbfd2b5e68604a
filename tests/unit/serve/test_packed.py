"""Packed weights that SGLang's kernels do not take are refused by the layer's name, before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.layer_shapes import layer_matrices
from tests.unit.serve.raw_tensors import write_raw
from tuneship.core.errors import ArtifactError, PreflightError
from tuneship.core.hardware import Gpu, Hardware
from tuneship.core.recipe import Serve
from tuneship.serve import packed
from tuneship.serve.assembly import assembled
from tuneship.serve.catalog import Catalog, Entry
from tuneship.serve.launch import configure
from tuneship.serve.preflight.base import linear
from tuneship.serve.supervisor import Patience

H100 = Hardware((Gpu("NVIDIA H100", 80 << 30, (9, 0)),), "580", "a processor", 16, 128 << 30)


def decoder(*sizes: int) -> dict[str, tuple[int, int]]:
    """{module: (out, in)} of one layer, and a head that stays as it is."""
    matrices = {f"model.layers.0.{name}": size for name, size in layer_matrices(*sizes).items()}
    return matrices | {"lm_head": (1001, sizes[0])}


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


def test_what_a_checkpoint_keeps_in_one_is_one():
    fused = {"model.layers.0.self_attn.qkv_proj": (960, 576), "model.layers.0.mlp.gate_up_proj": (3072, 768)}
    with pytest.raises(PreflightError, match="qkv_proj is 960 x 576"):
        packed.require(fused)


def test_experts_are_left_to_their_own_kernels():
    packed.require({"model.layers.0.mlp.experts.3.down_proj": (2048, 96)})


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
    with (
        pytest.raises(PreflightError, match="qkv_proj is 960 x 576") as caught,
        assembled(catalog, Serve(), H100, tmp_path / "log", None),
    ):
        pass
    assert "serve the original" in caught.value.hint
    over_two = Serve(extra_args=("--tp", "2"))
    with assembled(catalog, over_two, H100, tmp_path / "log", None):
        assert configure(over_two, catalog, H100, 1).quantization == "none", "how it is cut is SGLang's own matter"
    write_packed(path, decoder(1536, 256, 8960))
    with assembled(catalog, Serve(), H100, tmp_path / "log", None):
        assert configure(Serve(), catalog, H100, 1).quantization == "none"


def test_without_a_gpu_nothing_is_said_of_kernels(tmp_path: Path, capsys):
    path = write_packed(tmp_path / "packed", decoder(576, 192, 1536))
    catalog = Catalog("base", (Entry("b", "b@1", None, path, "", "b"),), packed.METHOD)
    cpu = H100._replace(gpus=())
    with assembled(catalog, Serve(), cpu, tmp_path / "log", None), pytest.raises(PreflightError, match="need a GPU"):
        configure(Serve(), catalog, cpu, 1)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(("sizes", "start_s"), [(decoder(1536, 256, 8960), packed.START_S), ({}, Patience().start_s)])
def test_only_what_has_to_compile_may_start_slowly(tmp_path: Path, capsys, sizes: dict, start_s: float):
    """FP8 and INT8 checkpoints are compressed-tensors' too, and nothing is compiled for minutes."""
    path = write_packed(tmp_path / "packed", sizes)
    catalog = Catalog("base", (Entry("b", "b@1", None, path, "", "b"),), packed.METHOD)
    with assembled(catalog, Serve(), H100, tmp_path / "log", None) as parts:
        assert parts.supervisor._patience.start_s == start_s
    assert ("which takes minutes" in capsys.readouterr().err) is bool(sizes)


def test_what_is_read_is_what_was_packed(tmp_path: Path):
    sizes = decoder(1536, 256, 8960)
    path = write_packed(tmp_path, sizes)
    assert packed.matrices(path) == linear(path) == sizes


@pytest.mark.parametrize("entry", [("I64", 24), ("F16", 4), ("I32", 4)], ids=str)
def test_a_shape_that_is_none(tmp_path: Path, entry: tuple[str, int]):
    dtype, size = entry
    width = {"I64": 8, "F16": 2, "I32": 4}[dtype]
    raw = {"a.weight_shape": {"dtype": dtype, "shape": [size // width], "data": bytes(size)}}
    write_raw(raw, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match="no pair of integers"):
        packed.matrices(tmp_path)
