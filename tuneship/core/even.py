"""Rewrite an adapter's tensors so that one rank and one scaling hold for all: what SGLang understands of patterns.

A module of a smaller rank gets rows of zeros below its lora_A and columns of zeros beside its lora_B, which changes no
product. A module of another scaling gets the quotient multiplied into its lora_B. Where every product can be written in
the tensors' own dtype (mostly: quotients are powers of two) the file keeps it and the adapter is the same to the last
bit; else all of it is written in float32, where a value is off by 6e-8 of itself at most.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuneship.core import tensor_file
from tuneship.core.servable import Folding
from tuneship.core.tensor_file import Slot

_PREFIX = "base_model.model."
_WIDE = "F32"


def module_of(key: str) -> str:
    """`base_model.model.model.layers.0.mlp.up_proj.lora_A.weight` -> `model.layers.0.mlp.up_proj`."""
    return key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")[0]


def changes(folding: Folding, ranks: Mapping[str, int]) -> bool:
    """Whether `folding` asks for other tensors than those of modules with these `ranks`."""
    return any(rank != folding.rank for rank in ranks.values()) or any(f != 1 for f in folding.factors.values())


def is_pairs(raw: bytes) -> bool:
    """Whether the safetensors file that holds `raw` has lora_A and lora_B alone."""
    from safetensors import deserialize  # noqa: PLC0415 - not for `--help`

    return all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name, _ in deserialize(raw))


def rewrite(raw: bytes, folding: Folding, out: Path) -> None:
    """Write the adapter whose file holds `raw`, all of it pairs of lora_A (rank, in) and lora_B (out, rank), to `out`.

    `raw` is a safetensors file of F32, F16 or BF16 that was checked already.
    """
    from safetensors import deserialize  # noqa: PLC0415 - as above

    found = {name: (entry["dtype"], _even(name, entry, folding)) for name, entry in sorted(deserialize(raw))}
    fits = all(dtype == _WIDE or _fits(values, dtype) for dtype, values in found.values())
    dtypes = {name: dtype if fits else _WIDE for name, (dtype, _) in found.items()}
    slots = {name: Slot(dtypes[name], values.shape) for name, (_, values) in found.items()}
    tensor_file.write(out, slots, (_narrow(values, dtypes[name]).data for name, (_, values) in found.items()))


def _even(name: str, entry: Mapping[str, Any], folding: Folding) -> Any:
    """The tensor in float32, as long as all others and, of a lora_B, multiplied."""
    import numpy as np  # noqa: PLC0415 - as above

    values = _widen(entry["data"], entry["dtype"]).reshape(entry["shape"])
    if ".lora_A" in name:
        return np.pad(values, ((0, folding.rank - values.shape[0]), (0, 0)))
    scaled = (values.astype(np.float64) * folding.factors[module_of(name)]).astype(np.float32)
    return np.pad(scaled, ((0, 0), (0, folding.rank - values.shape[1])))


def _widen(data: bytes, dtype: str) -> Any:
    """Float32 of a tensor's bytes, which is exact."""
    import numpy as np  # noqa: PLC0415 - as above

    if dtype == "BF16":  # numpy has none: the upper half of a float32
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(data, "<f2" if dtype == "F16" else "<f4").astype("<f4")


def _narrow(values: Any, dtype: str) -> Any:
    """`values` as `dtype` has them; what does not fit is cut, not rounded."""
    import numpy as np  # noqa: PLC0415 - as above

    if dtype == "BF16":
        return np.ascontiguousarray((np.ascontiguousarray(values).view("<u4") >> 16).astype("<u2"))
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values.astype("<f2" if dtype == "F16" else "<f4"))


def _fits(values: Any, dtype: str) -> bool:
    return bool((_widen(_narrow(values, dtype).tobytes(), dtype) == values.ravel()).all())
