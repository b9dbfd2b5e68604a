"""How an adapter's file is read: as what it is, and in little time, for every stream waits for it.

Upstream gaps: an adapter's weights are read with the load configuration of its base (`lora/lora.py`, 0.5.17 to 0.5.23).
The reader of plain safetensors refuses `bitsandbytes` with "Unknown load_format", and an adapter is never packed,
whatever its base is. And that reader is made for checkpoints: a pool of threads, a search for files and a progress bar
take longer than to read an adapter's one file. When an engine with a 4-bit base and an adapter starts without this
hook, the first gap is mended: `tests/unit/serve/test_plugin.py` then fails and says so.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from tuneship.serve import tensors

HOOKED = "sglang.srt.lora.lora.LoRAAdapter.initialize_weights"
_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def install() -> None:
    """Read every adapter as what its file is."""
    HookRegistry.register(HOOKED, read_as_it_is, HookType.AROUND)
    HookRegistry.apply_hooks()


def read_as_it_is(_: Callable[..., Any], adapter: Any) -> None:
    """Give an adapter the tensors of its file, and let it arrange them as its base's layers are.

    Raises:
        ArtifactError: the file is none of safetensors.
        KeyError, ValueError: a tensor has a type, or the folder files, that preflight refuses.

    """
    (file,) = Path(adapter.config.path).glob("*.safetensors")
    for name, tensor in _mapped(file).items():
        adapter._process_weight(name, tensor)
    adapter._normalize_weights()


def _mapped(file: Path) -> dict[str, torch.Tensor]:
    """{name: tensor} of a safetensors file, which lies in memory when somebody looks at it."""
    found = tensors.headers(file)
    whole = torch.from_file(str(file), size=file.stat().st_size, dtype=torch.uint8)
    mapped = {}
    for name, tensor in found.items():
        kind, piece = _TYPES[tensor.dtype], whole[tensor.start : tensor.end]
        if tensor.start % kind.itemsize:
            piece = piece.clone()
        mapped[name] = piece.view(kind).view(tensor.shape)
    return mapped
