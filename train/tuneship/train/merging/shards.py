"""A checkpoint's tensors, read one by one from its safetensors files and written one by one into new ones."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tuneship.core import tensor_file
from tuneship.core.errors import ArtifactError
from tuneship.core.tensor_file import Slot

SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"

DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
"""What a merged checkpoint may be written in."""


class Tensors:
    """Some safetensors files, mapped into memory one file at a time: `slots` says what is there, in reading order."""

    def __init__(self, files: Iterable[Path], keys: Mapping[str, Path] | None = None) -> None:
        """`keys` says in which file a tensor counts, where several have it."""
        self.slots: dict[str, Slot] = {}
        self._where: dict[str, Path] = {}
        self._open: tuple[Path, Any] | None = None
        for file in files:
            handle = self._handle(file)
            for key in handle.offset_keys():
                if keys is None or keys.get(key) == file:
                    entry = handle.get_slice(key)
                    self.slots[key] = Slot(entry.get_dtype(), tuple(entry.get_shape()))
                    self._where[key] = file
        missing = sorted((keys or {}).keys() - self.slots.keys())
        if missing:
            raise ArtifactError(f"the checkpoint lacks {missing[0]}, which its {INDEX} names", hint="download it again")

    def get(self, key: str) -> Tensor:
        """A view of the mapped file; keep it no longer than needed."""
        tensor: Tensor = self._handle(self._where[key]).get_tensor(key)
        return tensor

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor."""
        return {key: slot.shape for key, slot in self.slots.items()}

    def _handle(self, file: Path) -> Any:
        if self._open is None or self._open[0] != file:
            self._open = None
            try:
                self._open = (file, safe_open(file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ArtifactError(f"{file} cannot be read: {error}", hint="copy or download it again") from None
        return self._open[1]


def of_checkpoint(folder: Path) -> Tensors:
    """The tensors that transformers loads from `folder`; other files beside them do not count.

    Raises:
        ArtifactError: none there, or one is cut short.

    """
    if (folder / INDEX).is_file():
        listed = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        keys = {key: folder / name for key, name in listed.items()}
        return Tensors(sorted(set(keys.values())), keys)
    if (folder / _SINGLE).is_file():
        return Tensors([folder / _SINGLE])
    raise ArtifactError(f"{folder} has no {_SINGLE} and no {INDEX}", hint="convert pickled weights first")


def write(folder: Path, slots: Mapping[str, Slot], tensors: Iterable[Tensor]) -> None:
    """Write `tensors`, which come in the order of `slots`, in shards of at most `SHARD_BYTES` with their index.

    One tensor is held at a time. A tensor that is larger than a shard gets one of its own.
    """
    shards, source = _split(slots), iter(tensors)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = _SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensor_file.write(folder / name, shard, (_bytes(next(source)) for _ in shard))
        weight_map |= dict.fromkeys(shard, name)
    assert next(source, None) is None, "more tensors than places"
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(slot.size for slot in slots.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True), encoding="utf-8")


def _split(slots: Mapping[str, Slot]) -> list[dict[str, Slot]]:
    shards: list[dict[str, Slot]] = []
    room = 0
    for key, slot in slots.items():
        if slot.size > room or not shards:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][key] = slot
        room -= slot.size
    return shards


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
