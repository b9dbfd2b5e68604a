"""How an adapter's file is read: as what it is, and in little time, for every stream waits for it.

Upstream gaps: an adapter's weights are read with the load configuration of its base (`lora/lora.py`, 0.5.17 to 0.5.23).
The reader of plain safetensors refuses `bitsandbytes` with "Unknown load_format", and an adapter is never packed,
whatever its base is. And that reader is made for checkpoints: a pool of threads, a search for files and a progress bar
take longer than to read an adapter's one file. When an engine with a 4-bit base and an adapter starts without this
hook, the first gap is mended: `tests/unit/serve/test_plugin_adapters.py` then fails and says so.

Before each adapter SGLang also walks all modules of the base, to find which of its experts are gated. They stay as they
are, so one walk will do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from tuneship.serve import tensors
from tuneship.serve.sglang_plugin import adapter_staging
from tuneship.serve.tensors import Tensor

_ADAPTER = "sglang.srt.lora.lora.LoRAAdapter"
READ = f"{_ADAPTER}.initialize_weights"
WALK = f"{_ADAPTER}._build_moe_gated_map"
_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_walked: WeakKeyDictionary[Any, dict[int, bool]] = WeakKeyDictionary()
"""{base: what was found in it}."""


def install() -> None:
    """Read every adapter as what its file is, and walk its base once."""
    HookRegistry.register(READ, read_as_it_is, HookType.AROUND)
    HookRegistry.register(WALK, walk_once, HookType.AROUND)
    HookRegistry.apply_hooks()


def walk_once(original: Callable[[Any], dict[int, bool]], base: Any) -> dict[int, bool]:
    """{layer: whether its experts are gated}."""
    if base not in _walked:
        _walked[base] = original(base)
    return _walked[base]


def read_as_it_is(_: Callable[..., Any], adapter: Any) -> None:
    """Give an adapter the tensors of its file, and have it arrange them as its base's layers are.

    Raises:
        ArtifactError: the file is none of safetensors.
        KeyError, ValueError: a tensor has a type, or the folder files, that preflight refuses.
        OSError: the file cannot be read.

    """
    (file,) = Path(adapter.config.path).glob("*.safetensors")
    with adapter_staging.reading(adapter, file):
        found = tensors.headers(file)  # and nothing is mapped that is torn
        whole = torch.from_file(str(file), size=file.stat().st_size, dtype=torch.uint8)
        mapped = _cut(whole, found)
        for name, tensor in mapped.items():
            adapter._process_weight(name, tensor)
    if not adapter_staging.keep(adapter, whole, mapped.values()):
        adapter._normalize_weights()


def _cut(whole: torch.Tensor, found: Mapping[str, Tensor]) -> dict[str, torch.Tensor]:
    """{name: tensor} of a mapped file, which lies in memory when somebody looks at it; a copy of what lies askew."""
    typed = {kind: whole[: len(whole) - len(whole) % kind.itemsize].view(kind) for kind in _TYPES.values()}
    cut = {}
    for name, tensor in found.items():
        kind = _TYPES[tensor.dtype]
        start, askew = divmod(tensor.start, kind.itemsize)
        if askew:
            piece = whole[tensor.start : tensor.end].clone().view(kind)
        else:
            piece = typed[kind][start : tensor.end // kind.itemsize]
        cut[name] = piece.view(tensor.shape)
    return cut
