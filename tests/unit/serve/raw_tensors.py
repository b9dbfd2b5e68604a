"""safetensors files whose bytes a test chooses: dtypes that numpy has not, shapes that are wrong."""

from __future__ import annotations

import json
import struct
from pathlib import Path


def write_raw(entries: dict[str, dict], file: Path) -> None:
    """A safetensors file of raw bytes: {key: {dtype, shape, data}}; numpy has no bf16."""
    header, data = {}, b""
    for key, entry in entries.items():
        end = len(data) + len(entry["data"])
        header[key] = {"dtype": entry["dtype"], "shape": entry["shape"], "data_offsets": [len(data), end]}
        data += entry["data"]
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
