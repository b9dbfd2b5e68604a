"""An adapter goes to the GPU in one piece, and is arranged there.

Upstream gap: SGLang joins the matrices of an adapter (q, k and v; gate and up) on the CPU when it loads it. When it
moves it into a slot it pins some two hundred tensors one by one, and sends them so (`lora/lora.py`, `lora/mem_pool.py`,
0.5.17). All streams wait for both. Here the file is read to where it can be sent from while SGLang gets ready, sent at
once, and SGLang's own code does the rest with tensors that are there. When it moves an adapter as a whole itself,
`tests/unit/serve/test_plugin_adapters.py` fails and says so.

What an adapter keeps in memory is its file, mapped: one that comes back into a slot is read again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

MOVE = "sglang.srt.lora.mem_pool.LoRAMemoryPool.load_lora_weight_to_buffer"
MOST_BYTES = 1 << 27
"""A larger adapter goes as SGLang sends it: for a moment the GPU has to have room for it twice more."""
_WIDEST = 8
"""Bytes that the width of every dtype divides."""
_READERS = 4

_readers = ThreadPoolExecutor(_READERS, thread_name_prefix="adapter")


class _Ahead(NamedTuple):
    """An adapter's file on its way to where it is sent from."""

    adapter: Any
    room: torch.Tensor
    parts: list[Future[None]]


_ahead: list[_Ahead] = []
"""Of the adapter that was read last, and of no other: a hundred that nobody asks for yet would pin memory for all."""


def install() -> None:
    """Move every adapter in one piece, where it has been read for that."""
    HookRegistry.register(MOVE, move, HookType.AROUND)
    HookRegistry.apply_hooks()


def begin(adapter: Any, file: Path) -> None:
    """Have `file` read while its tensors are given to `adapter`."""
    _ahead.clear()
    size = file.stat().st_size
    if size <= MOST_BYTES:
        room, step = _room(adapter, size), -(-size // _READERS)
        places = [slice(start, min(start + step, size)) for start in range(0, size, step)]
        parts = [_readers.submit(_read, file, room.numpy(), place) for place in places]
        _ahead.append(_Ahead(adapter, room, parts))


def finish(adapter: Any, mapped: Collection[torch.Tensor]) -> bool:
    """Whether `adapter`, with these tensors, is arranged when it moves; else as SGLang does it, before.

    Raises:
        OSError: the file cannot be read to its end.

    """
    for ahead in _ahead:
        for part in ahead.parts:
            part.result()
    if len({tensor.untyped_storage().data_ptr() for tensor in mapped}) != 1:  # not all lie in the file as they must
        _ahead.clear()
    adapter.arranged_when_moved = bool(_ahead)
    return bool(_ahead)


def move(original: Callable[..., Any], pool: Any, uid: Any, slot: int, adapter: Any, *rest: Any, **more: Any) -> Any:
    """Move `adapter` into `slot`, once all of its tensors are there, and arranged."""
    if not getattr(adapter, "arranged_when_moved", False):
        return original(pool, uid, slot, adapter, *rest, **more)
    mapped = [layer.weights for layer in adapter.layers]
    try:
        try:
            _give(adapter, _sent(adapter, mapped))
            adapter._normalize_weights()
        except torch.OutOfMemoryError:  # then as SGLang does it
            _give(adapter, [dict(weights) for weights in mapped])
            adapter._normalize_weights()
        return original(pool, uid, slot, adapter, *rest, **more)
    finally:
        _give(adapter, mapped)


def _sent(adapter: Any, mapped: Sequence[Mapping[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """The same tensors, where the base is."""
    there = _whole(adapter, mapped).to(_device(adapter), non_blocking=True)
    typed = {kind: there.view(kind) for kind in {tensor.dtype for weights in mapped for tensor in weights.values()}}

    def sent(tensor: torch.Tensor) -> torch.Tensor:
        return typed[tensor.dtype].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    return [{name: sent(tensor) for name, tensor in weights.items()} for weights in mapped]


def _whole(adapter: Any, mapped: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor:
    """An adapter's file, in memory that torch gives to nobody else before a GPU has read it."""
    for ahead in _ahead:
        if ahead.adapter is adapter:
            _ahead.clear()
            return ahead.room
    storage = next(tensor for weights in mapped for tensor in weights.values()).untyped_storage()
    file = torch.empty(0, dtype=torch.uint8).set_(storage)
    room = _room(adapter, len(file))
    room[: len(file)].copy_(file)
    return room


def _room(adapter: Any, size: int) -> torch.Tensor:
    whole = -(-size // _WIDEST) * _WIDEST
    return torch.empty(whole, dtype=torch.uint8, pin_memory=_device(adapter).type != "cpu")


def _device(adapter: Any) -> torch.device:
    device: torch.device = next(adapter.base_model.parameters()).device
    return device


def _read(file: Path, room: Any, place: slice) -> None:
    """Read the bytes of `place` to where they lie in `room`.

    Raises:
        OSError: there are fewer.

    """
    left, start = memoryview(room)[place], place.start
    with file.open("rb", buffering=0) as opened:
        while left and (count := os.preadv(opened.fileno(), [left], start)):
            left, start = left[count:], start + count
    if left:
        raise OSError(f"{file} ends {len(left)} bytes too early")


def _give(adapter: Any, weights: Iterable[dict[str, torch.Tensor]]) -> None:
    for layer, its in zip(adapter.layers, weights, strict=True):
        layer.weights = its
