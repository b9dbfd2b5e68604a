"""Write a safetensors file tensor by tensor, holding none of it; the library's own writer wants all of them at once.

    write(path, {"a.weight": Slot("BF16", (4, 8))}, (bytes_of(name) for name in ...))

Format: 8 bytes little-endian length, that many bytes of JSON padded with spaces to a multiple of 8, then the data that
the JSON's offsets cover without gaps (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}


class Slot(NamedTuple):
    """One tensor's place; `dtype` as safetensors names it, such as `BF16`."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * _BITS[self.dtype] // 8


def write(
    path: Path, slots: Mapping[str, Slot], data: Iterable[Any], metadata: Mapping[str, str] | None = None
) -> None:
    """A file of the tensors in `slots`, whose `data` (buffers of little-endian bytes) come in the same order."""
    with path.open("wb") as file:
        file.write(_header(slots, metadata or {"format": "pt"}))
        for (name, slot), values in zip(slots.items(), data, strict=True):
            written = file.write(values)
            assert written == slot.size, f"{name} has {written} bytes, not {slot.size}"


def _header(slots: Mapping[str, Slot], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name, slot in slots.items():
        entries[name] = {"dtype": slot.dtype, "shape": slot.shape, "data_offsets": (start, start + slot.size)}
        start += slot.size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
