"""Tensors of safetensors files, read without torch and without holding a file in memory.

    headers(file)     # {key: dtype, shape, place}
    read(file)        # the same, what the values are like, and the file's SHA-256, of one and the same bytes
    digest(file)      # the same without a look at the values; `look` without the SHA-256

Format: 8 bytes little-endian length, that many bytes of JSON, then the data that the JSON's offsets cover without gaps
(https://github.com/huggingface/safetensors#format). The library checks all of that when it opens a file, so we ask it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

from tuneship.core.errors import ArtifactError
from tuneship.core.quoting import on_one_line

NF4_STATE = ".quant_state.bitsandbytes__nf4"
"""Behind the key of a weight that bitsandbytes has packed: its state as JSON, the true shape in it."""
PACKED_SHAPE = ".weight_shape"
"""Behind a module whose weight compressed-tensors has packed: its true shape, two integers."""
_BLOCK = 1 << 20
"""Bytes that are read, hashed and looked at together: few enough for the processor's cache."""
_AHEAD = 8
"""Blocks that may wait to be hashed."""


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


class Contents(NamedTuple):
    """A file that was read once, from end to end: what was looked at is what was hashed."""

    size: int
    sha256: str
    headers: dict[str, Tensor]
    values: dict[str, Values]
    """Of the tensors of `FLOATS`."""


class _Piece(NamedTuple):
    """A tensor, or what of a large one fits into a block; bytes from the file's beginning."""

    key: str
    start: int
    end: int


def headers(file: Path) -> dict[str, Tensor]:
    """{key: what the header says} of every tensor in `file`.

    Raises:
        ArtifactError: not a safetensors file, cut short, or with a header that does not fit its data.

    """
    with _readable(file) as opened:
        return _header(opened)[1]


def read(file: Path) -> Contents:
    """Everything about `file`, of one pass over its bytes: hashed in a thread while they are looked at in this one.

    Raises:
        ArtifactError: as `headers`.

    """
    return _read(file, look=True, hashed=True)


def digest(file: Path) -> Contents:
    """`read` without a look at the values.

    Raises:
        ArtifactError: as `headers`.

    """
    return _read(file, look=False, hashed=True)


def look(file: Path) -> Contents:
    """`read` without the SHA-256.

    Raises:
        ArtifactError: as `headers`.

    """
    return _read(file, look=True, hashed=False)


def _read(file: Path, *, look: bool, hashed: bool) -> Contents:
    if not file.is_file():  # opening a pipe would wait for somebody to write
        raise ArtifactError(f"{file} is not a file")
    sha256, hashing = hashlib.sha256(), list[Future[None]]()
    buffers = [memoryview(bytearray(_BLOCK)) for _ in range(_AHEAD)]
    with _readable(file) as opened, ThreadPoolExecutor(1) as hasher:
        header, found = _header(opened)
        sha256.update(header)
        size, highest = len(header), {key: 0 for key, tensor in found.items() if look and tensor.dtype in FLOATS}
        for number, block in enumerate(_blocks(found)):
            if hashed and number >= _AHEAD:
                hashing[number - _AHEAD].result()
            data = buffers[number % _AHEAD][: block[-1].end - block[0].start]
            if block[0].start != size or opened.readinto(data) != len(data):
                raise ValueError("it is being written to")
            if hashed:
                hashing.append(hasher.submit(sha256.update, data))
            for key, start, end in block:
                if key in highest:
                    raw = data[start - size : end - size]
                    highest[key] = max(highest[key], _highest(raw, FLOATS[found[key].dtype]))
            size += len(data)
        if opened.read(1):
            raise ValueError("it is being written to")
    values = {key: Values(most < FLOATS[found[key].dtype].exponent, most == 0) for key, most in highest.items()}
    return Contents(size, sha256.hexdigest() if hashed else "", found, values)


def read_bytes(file: Path, tensor: Tensor) -> bytes:
    """The raw data of one tensor."""
    with file.open("rb") as opened:
        opened.seek(tensor.start)
        return opened.read(tensor.end - tensor.start)


def nf4_shape(file: Path, state: Tensor) -> tuple[int, int]:
    """(out, in) of a matrix that bitsandbytes has packed, as it was; `state` lies beside it, under `NF4_STATE`.

    Raises:
        ArtifactError: it names no shape.

    """
    try:
        rows, columns = map(int, json.loads(read_bytes(file, state))["shape"])
    except (ValueError, TypeError, LookupError, RecursionError):
        raise ArtifactError(f"{file}: the state of a packed weight names no shape", hint="make it again") from None
    return rows, columns


def packed_shape(file: Path, tensor: Tensor) -> tuple[int, int]:
    """(out, in) of a weight that compressed-tensors packed; `tensor` is the one of `PACKED_SHAPE`.

    Raises:
        ArtifactError: it is no pair of integers.

    """
    raw, width = read_bytes(file, tensor), {"I32": 4, "I64": 8}.get(tensor.dtype, 0)
    sizes = [int.from_bytes(raw[at : at + width], "little") for at in range(0, len(raw), width)] if width else []
    if len(sizes) != 2:
        raise ArtifactError(f"{file}: the shape of a packed weight is no pair of integers", hint="make it again")
    return sizes[0], sizes[1]


@contextmanager
def _readable(file: Path) -> Iterator[BufferedReader]:
    """`file`, which the library has found to be whole; what is wrong with it in there is said as that."""
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415 - not for `--help`

    try:
        with safe_open(file, framework="numpy"), file.open("rb") as opened:
            yield opened
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(
            f"{file} cannot be read ({on_one_line(str(error))}): truncated, or not safetensors",
            hint="copy or download it again",
        ) from None


def _header(opened: BufferedReader) -> tuple[bytes, dict[str, Tensor]]:
    """What stands before the data, as it is and as it is meant."""
    prefix = opened.read(8)
    length = int.from_bytes(prefix, "little")
    raw = opened.read(length)
    listed = json.loads(raw)
    listed.pop("__metadata__", None)
    return prefix + raw, {
        key: Tensor(entry["dtype"], tuple(entry["shape"]), *(8 + length + offset for offset in entry["data_offsets"]))
        for key, entry in listed.items()
    }


def _blocks(found: Mapping[str, Tensor]) -> Iterator[list[_Piece]]:
    """All data in the file's order, in blocks of neighbours."""
    block: list[_Piece] = []
    for key, tensor in sorted(found.items(), key=lambda item: item[1].start):
        for start in range(tensor.start, tensor.end, _BLOCK):
            piece = _Piece(key, start, min(start + _BLOCK, tensor.end))
            if block and piece.end - block[0].start > _BLOCK:
                yield block
                block = []
            block.append(piece)
    if block:
        yield block


def _highest(raw: memoryview, layout: _Float) -> int:
    """The largest magnitude among some values, as its bits: they are in the order of what they stand for."""
    import numpy as np  # noqa: PLC0415 - as above

    values = np.frombuffer(raw, layout.width)
    # Those without a sign bit are the largest of signed integers, those with one of unsigned ones.
    return max(int(values.view(layout.width.replace("u", "i")).max()), int(values.max()) & layout.magnitude)
