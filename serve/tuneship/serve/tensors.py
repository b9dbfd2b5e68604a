"""Tensors of safetensors files, read without torch and without holding a file in memory.

Format: 8 bytes little-endian length, that many bytes of JSON, then the data that the JSON's offsets cover without gaps
(https://github.com/huggingface/safetensors#format). The library checks all of that when it opens a file, so we ask it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tuneship.core.errors import ArtifactError

NF4_STATE = ".quant_state.bitsandbytes__nf4"
"""Behind the key of a weight that bitsandbytes has packed: its state as JSON, the true shape in it."""
_CHUNK = 1 << 22
"""Values looked at together."""


class _Float(NamedTuple):
    """How a dtype is looked at as unsigned integers; all exponent bits set means NaN or infinity."""

    width: str
    exponent: int
    magnitude: int


FLOATS = {
    "F32": _Float("<u4", 0x7F80_0000, 0x7FFF_FFFF),
    "F16": _Float("<u2", 0x7C00, 0x7FFF),
    "BF16": _Float("<u2", 0x7F80, 0x7FFF),
}
"""The dtypes whose values can be looked at; numpy itself has no bf16."""


class Tensor(NamedTuple):
    """One entry of a file's header. `start` and `end` are bytes from the file's beginning."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Values(NamedTuple):
    """What a tensor holds."""

    finite: bool
    zero: bool


def headers(file: Path) -> dict[str, Tensor]:
    """{key: what the header says} of every tensor in `file`.

    Raises:
        ArtifactError: not a safetensors file, cut short, or with a header that does not fit its data.

    """
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415 - not for `--help`

    try:
        with safe_open(file, framework="numpy"), file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            listed = json.loads(opened.read(length))
    except (SafetensorError, OSError) as error:
        raise ArtifactError(
            f"{file} cannot be read ({error}): truncated, or not safetensors", hint="copy or download it again"
        ) from None
    listed.pop("__metadata__", None)
    return {
        key: Tensor(entry["dtype"], tuple(entry["shape"]), *(8 + length + offset for offset in entry["data_offsets"]))
        for key, entry in listed.items()
    }


def read_bytes(file: Path, tensor: Tensor) -> bytes:
    """The raw data of one tensor."""
    with file.open("rb") as opened:
        opened.seek(tensor.start)
        return opened.read(tensor.end - tensor.start)


def nf4_shape(file: Path, state: Tensor) -> tuple[int, int]:
    """(out, in) of a matrix that bitsandbytes has packed, as it was; `state` lies beside it, under `NF4_STATE`."""
    rows, columns = json.loads(read_bytes(file, state))["shape"]
    return rows, columns


def look_at(file: Path, tensor: Tensor) -> Values:
    """Whether all values of a float tensor are finite, and whether all are zero."""
    layout = FLOATS[tensor.dtype]
    finite, zero = True, True
    for chunk in _chunks(file, tensor, layout.width):
        finite = finite and not ((chunk & layout.exponent) == layout.exponent).any()
        zero = zero and not (chunk & layout.magnitude).any()
    return Values(finite, zero)


def _chunks(file: Path, tensor: Tensor, width: str) -> Iterator[Any]:
    import numpy as np  # noqa: PLC0415 - as above

    count = (tensor.end - tensor.start) // np.dtype(width).itemsize
    for begin in range(0, count, _CHUNK):
        offset = tensor.start + begin * np.dtype(width).itemsize
        yield np.fromfile(file, np.dtype(width), min(_CHUNK, count - begin), offset=offset)
