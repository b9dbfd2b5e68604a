"""Weights that compressed-tensors has packed (W4A16, W8A16): whether SGLang's kernels take them, before it starts.

    packed.require(packed.matrices(folder))                          # of a checkpoint that is packed
    packed.require(linear(folder), hint="merge.quantize = 'fp8'")    # of one that shall be

SGLang (0.5.17) computes such layers with Marlin, whose tiles are 64 x 128 and 128 x 64 values. It does not ask whether
they fit before the first token, and then ends. Experts have other kernels, and how layers are cut over several GPUs is
SGLang's own matter: neither is judged here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tuneship.core.errors import PreflightError
from tuneship.core.quoting import on_one_line
from tuneship.core.servable import FUSED, PROJECTIONS
from tuneship.serve import tensors

METHOD = "compressed-tensors"
START_S = 1800.0
"""How long a first start may take: one compiler, for all of Marlin's kernels. 377 s were measured on an H200's host."""
_TILE = (64, 128)
_EXPERTS = ".experts."
_PART_OF = {part: layer for layer, parts in FUSED.items() for part in parts}


def matrices(folder: Path) -> dict[str, tuple[int, int]]:
    """{module: (out, in)} of the packed weights in `folder`, as they were before; none where it is packed otherwise.

    Raises:
        ArtifactError: a weight file that is none, or is cut short.

    """
    return {
        key.removesuffix(tensors.PACKED_SHAPE): tensors.packed_shape(file, tensor)
        for file in sorted(folder.glob("*.safetensors"))
        for key, tensor in tensors.headers(file).items()
        if key.endswith(tensors.PACKED_SHAPE)
    }


def require(
    linear: Mapping[str, tuple[int, int]],
    hint: str = "serve the original, in 16 bits or with --quantization fp8 or nf4",
) -> None:
    """Refuse a model with a layer that Marlin's tiles do not cover; `linear` is {module: (out, in)}.

    Raises:
        PreflightError: there is one; `hint` says what to do.

    """
    for layer, (rows, columns) in _layers(linear).items():
        if not any(_divides((rows, columns), tile) for tile in (_TILE, _TILE[::-1])):
            raise PreflightError(
                f"{on_one_line(layer)} is {rows} x {columns}, and SGLang's kernels for packed weights take 64 x 128 or "
                "128 x 64 values at a time",
                hint=hint,
            )


def _layers(linear: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """{layer: (out, in)} as SGLang has them: q, k, v are one, and so are gate and up."""
    found: dict[str, tuple[int, int]] = {}
    for module, (rows, columns) in linear.items():
        parent, _, name = module.rpartition(".")
        if name in {*PROJECTIONS, *FUSED} and _EXPERTS not in module:
            layer = f"{parent}.{_PART_OF.get(name, name)}"
            found[layer] = (found.get(layer, (0, 0))[0] + rows, columns)
    return found


def _divides(sizes: tuple[int, int], tile: tuple[int, int]) -> bool:
    return not any(size % side for size, side in zip(sizes, tile, strict=True))
