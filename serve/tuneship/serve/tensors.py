"""Tensors of safetensors files, read without torch and without holding a file in memory.

    headers(file)     # {key: dtype, shape, place}
    read(file)        # the same, what the values are like, and the file's SHA-256, of one and the same bytes
    digest(file)      # the same without a look at the values; `look` without the SHA-256

Format: 8 bytes little-endian length, that many bytes of JSON, then the data that the JSON's offsets cover without gaps
(https://github.com/huggingface/safetensors#format). The library checks all of that when it opens a file, so we ask it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

from tuneship.core.errors import ArtifactError
from tuneship.core.files import read_at
from tuneship.core.quoting import on_one_line

NF4_STATE = ".quant_state.bitsandbytes__nf4"
"""Behind the key of a weight that bitsandbytes has packed: its state as JSON, the true shape in it."""
PACKED_SHAPE = ".weight_shape"
"""Behind a module whose weight compressed-tensors has packed: its true shape, two integers."""
_BLOCK = 1 << 20
"""Bytes that are read, hashed and looked at together: few enough for the processor's cache."""
_AHEAD = 8
"""Blocks that may wait to be hashed."""
_LOOKERS = 4
"""Threads that look at values."""
_WRITTEN_TO = "it is being written to"


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
    return _read(file, look=True)


def digest(file: Path) -> Contents:
    """`read` without a look at the values.

    Raises:
        ArtifactError: as `headers`.

    """
    return _read(file, look=False)


def look(file: Path) -> Contents:
    """`read` without the SHA-256, in threads: everybody waits for it who waits for an adapter.

    Raises:
        ArtifactError: as `headers`.

    """

    def looked(first: int) -> list[tuple[str, int]]:
        buffer, highest = memoryview(bytearray(_BLOCK)), list[tuple[str, int]]()
        for block in blocks[first::_LOOKERS]:
            data = buffer[: block[-1].end - block[0].start]
            if read_at(opened.fileno(), block[0].start, data) != len(data):
                raise ValueError(_WRITTEN_TO)
            highest += _highest(data, block, found)
        return highest

    with _readable(file) as opened:
        header, found = _header(opened)
        blocks = list(_blocks(found, len(header)))
        end = blocks[-1][-1].end if blocks else len(header)
        with ThreadPoolExecutor(_LOOKERS) as pool:
            highest = list(itertools.chain.from_iterable(pool.map(looked, range(_LOOKERS))))
        if os.fstat(opened.fileno()).st_size != end:
            raise ValueError(_WRITTEN_TO)
    return Contents(end, "", found, _values(found, highest))


def _read(file: Path, *, look: bool) -> Contents:
    sha256, hashing, highest = hashlib.sha256(), list[Future[None]](), list[tuple[str, int]]()
    buffers = [memoryview(bytearray(_BLOCK)) for _ in range(_AHEAD)]
    with _readable(file) as opened, ThreadPoolExecutor(1) as hasher:
        header, found = _header(opened)
        sha256.update(header)
        size = len(header)
        for number, block in enumerate(_blocks(found, size)):
            if number >= _AHEAD:
                hashing[number - _AHEAD].result()
            data = buffers[number % _AHEAD][: block[-1].end - size]
            if opened.readinto(data) != len(data):
                raise ValueError(_WRITTEN_TO)
            hashing.append(hasher.submit(sha256.update, data))
            if look:
                highest += _highest(data, block, found)
            size += len(data)
        if opened.read(1):
            raise ValueError(_WRITTEN_TO)
    return Contents(size, sha256.hexdigest(), found, _values(found, highest) if look else {})


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

    if not file.is_file():  # opening a pipe would wait for somebody to write
        raise ArtifactError(f"{file} is not a file")
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


def _blocks(found: Mapping[str, Tensor], begin: int) -> Iterator[list[_Piece]]:
    """All data in the file's order, in blocks of neighbours, from byte `begin` on."""
    block: list[_Piece] = []
    end = begin
    for key, tensor in sorted(found.items(), key=lambda item: item[1].start):
        for start in range(tensor.start, tensor.end, _BLOCK):
            if start != end:
                raise ValueError(_WRITTEN_TO)
            end = min(start + _BLOCK, tensor.end)
            if block and end - block[0].start > _BLOCK:
                yield block
                block = []
            block.append(_Piece(key, start, end))
    if block:
        yield block


def _highest(data: memoryview, block: Sequence[_Piece], found: Mapping[str, Tensor]) -> Iterator[tuple[str, int]]:
    """(key, the largest magnitude as its bits) of every piece that can be looked at: bits are in the order of values.

    `data` is the block. numpy is asked once for all neighbours of a dtype.
    """
    import numpy as np  # noqa: PLC0415 - not for `--help`

    for dtype, neighbours in itertools.groupby(block, lambda piece: found[piece.key].dtype):
        if dtype not in FLOATS:
            continue
        pieces, layout = list(neighbours), FLOATS[dtype]
        first, last = pieces[0].start, pieces[-1].end
        values = np.frombuffer(data[first - block[0].start : last - block[0].start], layout.width)
        starts = [(piece.start - first) // values.itemsize for piece in pieces]
        # Those without a sign bit are the largest of signed integers, those with one of unsigned ones.
        positive = np.maximum.reduceat(values.view(layout.width.replace("u", "i")), starts)
        negative = np.maximum.reduceat(values, starts) & layout.magnitude
        yield from zip((piece.key for piece in pieces), np.maximum(positive, negative).tolist(), strict=True)


def _values(found: Mapping[str, Tensor], highest: Iterable[tuple[str, int]]) -> dict[str, Values]:
    """What every tensor that could be looked at holds, from its pieces."""
    most = {key: 0 for key, tensor in found.items() if tensor.dtype in FLOATS}
    for key, bits in highest:
        most[key] = max(most[key], bits)
    return {key: Values(bits < FLOATS[found[key].dtype].exponent, bits == 0) for key, bits in most.items()}
