"""An adapter goes to the GPU in one piece, and is arranged there.

Upstream gap: SGLang joins the matrices of an adapter (q, k and v; gate and up) on the CPU when it loads it. When it
moves it into a slot it pins some two hundred tensors one by one, and sends them so (`lora/lora.py`, `lora/mem_pool.py`,
0.5.17). All streams wait for both. Here the file is read to where it can be sent from while SGLang gets ready, sent at
once, and SGLang's own code does the rest with tensors that are there. When it moves an adapter as a whole itself,
`tests/unit/serve/test_plugin_adapters.py` fails and says so.

What an adapter keeps in memory is its file, mapped: one that comes back into a slot is read again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from tuneship.core.files import read_at

MOVE = "sglang.srt.lora.mem_pool.LoRAMemoryPool.load_lora_weight_to_buffer"
MOST_BYTES = 1 << 27
"""A larger adapter goes as SGLang sends it: for a moment the GPU has to have room for it twice more."""
_WIDEST = 8
"""Bytes that the width of every dtype divides."""
_READERS = 4

_readers = ThreadPoolExecutor(_READERS, thread_name_prefix="adapter")


class _Ahead(NamedTuple):
    """An adapter's file where it is sent from."""

    adapter: Any
    room: torch.Tensor


_ahead: list[_Ahead] = []
"""Of the adapter that was read last, and of no other: a hundred that nobody asks for yet would pin memory for all.

It goes when that is moved, or the next one is read."""


def install() -> None:
    """Move every adapter in one piece, where it has been read for that."""
    HookRegistry.register(MOVE, move, HookType.AROUND)
    HookRegistry.apply_hooks()


@contextmanager
def reading(adapter: Any, file: Path) -> Iterator[None]:
    """Have `file` read while its tensors are given to `adapter`.

    Raises:
        OSError: it cannot be read to its end.

    """
    _ahead.clear()
    size = file.stat().st_size
    if size > MOST_BYTES:
        yield
        return
    room = _room(adapter, size)
    parts = [_readers.submit(_read, file, room, place) for place in _places(size)]
    yield
    for part in parts:
        part.result()
    _ahead.append(_Ahead(adapter, room))


def keep(adapter: Any, whole: torch.Tensor, mapped: Iterable[torch.Tensor]) -> bool:
    """Whether `adapter` is arranged when it moves: if it was read, and all of its tensors lie in `whole`, the file."""
    storage = whole.untyped_storage().data_ptr()
    if any(tensor.untyped_storage().data_ptr() != storage for tensor in mapped):
        _ahead.clear()
    adapter.mapped_file = whole if _ahead else None
    return bool(_ahead)


def move(original: Callable[..., Any], pool: Any, uid: Any, slot: int, adapter: Any, *rest: Any, **more: Any) -> Any:
    """Move `adapter` into `slot`, once all of its tensors are there, and arranged."""
    if getattr(adapter, "mapped_file", None) is None:
        return original(pool, uid, slot, adapter, *rest, **more)
    mapped = [layer.weights for layer in adapter.layers]

    def moved(weights: Iterable[dict[str, torch.Tensor]]) -> Any:
        _give(adapter, weights)
        adapter._normalize_weights()
        return original(pool, uid, slot, adapter, *rest, **more)

    try:
        with suppress(torch.OutOfMemoryError):
            return moved(_sent(adapter, mapped))
        return moved([dict(weights) for weights in mapped])  # all of it again, as SGLang does it
    finally:
        _give(adapter, mapped)


def _sent(adapter: Any, mapped: Sequence[Mapping[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """The same tensors, where the base is."""
    there = _whole(adapter).to(_device(adapter), non_blocking=True)
    typed = {kind: there.view(kind) for kind in {tensor.dtype for weights in mapped for tensor in weights.values()}}

    def sent(tensor: torch.Tensor) -> torch.Tensor:
        return typed[tensor.dtype].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    return [{name: sent(tensor) for name, tensor in weights.items()} for weights in mapped]


def _whole(adapter: Any) -> torch.Tensor:
    """An adapter's file, in memory that torch gives to nobody else before a GPU has read it."""
    for ahead in _ahead:
        if ahead.adapter is adapter:
            _ahead.clear()
            return ahead.room
    file = adapter.mapped_file
    room = _room(adapter, len(file))
    list(_readers.map(lambda place: room[place].copy_(file[place]), _places(len(file))))
    return room


def _room(adapter: Any, size: int) -> torch.Tensor:
    """For `size` bytes; pinned for a GPU, if the machine has as much of that."""
    whole = -(-size // _WIDEST) * _WIDEST
    with suppress(RuntimeError):
        return torch.empty(whole, dtype=torch.uint8, pin_memory=_device(adapter).type != "cpu")
    return torch.empty(whole, dtype=torch.uint8)


def _device(adapter: Any) -> torch.device:
    device: torch.device = next(adapter.base_model.parameters()).device
    return device


def _places(size: int) -> list[slice]:
    """One part of so many bytes for each reader."""
    step = -(-size // _READERS)
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _read(file: Path, room: torch.Tensor, place: slice) -> None:
    """Read the bytes of `place` to where they lie in `room`.

    Raises:
        OSError: there are fewer.

    """
    into = memoryview(room.numpy())[place]
    with file.open("rb", buffering=0) as opened:
        missing = len(into) - read_at(opened.fileno(), place.start, into)
    if missing:
        raise OSError(f"{file} ends {missing} bytes too early")


def _give(adapter: Any, weights: Iterable[dict[str, torch.Tensor]]) -> None:
    for layer, its in zip(adapter.layers, weights, strict=True):
        layer.weights = its
