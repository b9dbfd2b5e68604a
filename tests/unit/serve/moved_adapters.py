"""Run in an engine of ours, for `test_plugin_adapters.py`: how adapters are read and moved, as JSON.

python -m tests.unit.serve.moved_adapters      # with TUNESHIP_ENGINE=1; SGLang takes 10 s to import
"""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file

(ours,) = [entry for entry in entry_points(group="sglang.srt.plugins") if entry.name == "tuneship"]
ours.load()()

from sglang.srt.lora.lora import LoRAAdapter  # noqa: E402 - hooked by now
from sglang.srt.lora.lora_config import LoRAConfig  # noqa: E402
from sglang.srt.lora.utils import LoRABatchInfo  # noqa: E402

from tuneship.serve.sglang_plugin import adapter_reading, adapter_staging, segments_in_use  # noqa: E402

SHAPES = {"q_proj": (8, 8), "k_proj": (4, 8), "v_proj": (4, 8), "o_proj": (8, 8)}
SHAPES |= {"gate_proj": (6, 8), "up_proj": (6, 8), "down_proj": (8, 6)}
WEIGHTS = "adapter_model.safetensors"
Weights = list[dict[str, torch.Tensor]]


class Base(torch.nn.Linear):
    """A base that counts how often it is walked."""

    walks = 0

    def named_modules(self, *given: Any, **named: Any) -> Any:
        Base.walks += 1
        return super().named_modules(*given, **named)


def write(folder: str, name: str, seed: int = 0) -> tuple[str, dict[str, torch.Tensor]]:
    """An adapter of two layers in a directory of its own, and what is in it."""
    generator = torch.Generator().manual_seed(seed)
    written = {}
    for layer, (module, (rows, columns)) in itertools.product(range(2), SHAPES.items()):
        key = f"base_model.model.model.layers.{layer}.x.{module}"
        kind = torch.float32 if module == "o_proj" else torch.bfloat16
        for half, shape in (("lora_A", (2, columns)), ("lora_B", (rows, 2))):
            written[f"{key}.{half}.weight"] = torch.randn(shape, generator=generator).to(kind)
    path = Path(folder, name)
    path.mkdir()
    save_file(written, path / WEIGHTS)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": list(SHAPES)}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return str(path), written


def adapter_of(path: str, read: bool = True) -> LoRAAdapter:
    hf_config, base = SimpleNamespace(num_hidden_layers=2), torch.nn.Linear(1, 1)
    adapter = LoRAAdapter("uid", LoRAConfig(path), hf_config, None, None, base_model=base)
    if read:
        adapter.initialize_weights()
    return adapter


def as_sglang_arranges(path: str, written: dict[str, torch.Tensor]) -> Weights:
    adapter = adapter_of(path, read=False)
    adapter.initialize_weights_from_tensors(written)
    return [layer.weights for layer in adapter.layers]


def moved(adapter: Any, failures: int = 0) -> Weights:
    """What SGLang's own function finds in `adapter`; its first calls find no room on the GPU."""
    calls = itertools.count(1)

    def original(*given: Any) -> Weights:
        if next(calls) <= failures:
            raise torch.OutOfMemoryError
        assert [*given[:3], *given[4:]] == ["pool", "uid", 3, "modules"]
        return [dict(layer.weights) for layer in given[3].layers]

    return adapter_staging.move(original, "pool", "uid", 3, adapter, "modules")


def same(one: Weights, other: Weights) -> bool:
    return [sorted(each) for each in one] == [sorted(each) for each in other] and all(
        torch.equal(tensor, there[name])
        for each, there in zip(one, other, strict=True)
        for name, tensor in each.items()
    )


def reading(folder: str) -> dict[str, Any]:
    """Tensors of every type, one of which begins between two of its values."""
    written = {
        "a.lora_A": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
        "b.lora_B": torch.randn(4, 2),
        "c.none": torch.empty(0, 3),
        "d.half": torch.randn(5).half(),
    }
    save_file(written, Path(folder, WEIGHTS))
    insert(Path(folder, WEIGHTS), "e.odd", 0.5)
    read: dict[str, torch.Tensor] = {}
    arranged = []
    adapter = SimpleNamespace(
        config=SimpleNamespace(path=folder),
        base_model=torch.nn.Linear(1, 1),
        _process_weight=lambda name, tensor: read.update({name: tensor}),
        _normalize_weights=lambda: arranged.append(sorted(read)),
    )
    adapter_reading.read_as_it_is(adapter_of, adapter)
    odd = read.pop("e.odd").item()
    same = {name: [str(t.dtype), list(t.shape), bool(torch.equal(t, written[name]))] for name, t in read.items()}
    return {"arranged": arranged, "same": same, "odd": odd}


def insert(file: Path, name: str, value: float) -> None:
    """A float32 at the end of `file`, whatever comes before it."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, end = json.loads(raw[8 : 8 + length]), len(raw) - 8 - length
    header[name] = {"dtype": "F32", "shape": [1], "data_offsets": [end, end + 4]}
    padded = json.dumps(header).encode()
    padded += b" " * (-len(padded) % 8)
    data = raw[8 + length :] + torch.tensor([value]).numpy().tobytes()
    file.write_bytes(len(padded).to_bytes(8, "little") + padded + data)


def one_askew(folder: str) -> bool:
    """Whether a file whose only tensor lies askew is taken for one that can be sent."""
    Path(folder).mkdir()
    file = Path(folder, WEIGHTS)
    save_file({"one": torch.ones(2)}, file)
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    file.write_bytes((length + 1).to_bytes(8, "little") + raw[8 : 8 + length] + b" " + raw[8 + length :])
    arranged: list[bool] = []
    adapter = SimpleNamespace(
        config=SimpleNamespace(path=folder),
        base_model=torch.nn.Linear(1, 1),
        _process_weight=lambda *_: None,
        _normalize_weights=lambda: arranged.append(True),
    )
    adapter_reading.read_as_it_is(adapter_of, adapter)
    return not arranged


def staging(folder: str) -> dict[str, Any]:
    """Adapters that are moved at once, late, again, without room, too large, and while others are read."""
    path, written = write(folder, "one")
    other_path, other_written = write(folder, "other", seed=1)
    theirs, theirs_of_other = as_sglang_arranges(path, written), as_sglang_arranges(other_path, other_written)
    found = {}

    one = adapter_of(path)
    mapped = [dict(layer.weights) for layer in one.layers]
    found["at once"] = same(moved(one), theirs)
    found["again"] = same(moved(one), theirs)
    found["no room, and then as SGLang does it"] = same(moved(one, failures=1), theirs)
    kept = same(mapped, [layer.weights for layer in one.layers]) and not same(mapped, theirs)

    first, second = adapter_of(path), adapter_of(other_path)  # the second is read before the first is moved
    found["another was read since"] = same(moved(first), theirs)
    found["the other"] = same(moved(second), theirs_of_other)

    read = adapter_staging._read
    adapter_staging._read = lambda *given: (time.sleep(0.1 if given[2].start else 0), read(*given))
    found["a slow part"] = same(moved(adapter_of(path)), theirs)
    adapter_staging._read = read

    blank = adapter_of(path)
    adapter_staging._ahead[0].room.zero_()
    sent = all(not tensor.any() for each in moved(blank) for tensor in each.values())

    most, adapter_staging.MOST_BYTES = adapter_staging.MOST_BYTES, 100
    large = adapter_of(path)
    found["too large"] = same([layer.weights for layer in large.layers], theirs) and same(moved(large), theirs)
    adapter_staging.MOST_BYTES = most

    try:
        adapter_staging._read(Path(path, "adapter_config.json"), torch.empty(9999, dtype=torch.uint8), slice(8, 6000))
    except OSError as error:
        cut = str(error).rpartition("/")[2]
    nowhere = SimpleNamespace(base_model=torch.nn.Linear(1, 1, device="meta"))
    return {
        "as SGLang arranges them": found,
        "what was read is what is sent": sent,
        "kept": kept,
        "the base": adapter_staging.move(lambda *given: given, "pool", None, 0, None, "modules"),
        "cut": cut,
        "room": adapter_staging._room(nowhere, 5).nbytes,
        "askew": one_askew(f"{folder}/askew"),
    }


def walked() -> tuple[list[dict[int, bool]], int]:
    """What is found in a base three times, and how often it was walked for that."""
    base = Base(1, 1)
    return [LoRAAdapter._build_moe_gated_map(base) for _ in range(3)], Base.walks


def launched(tokens: int, graph: bool) -> list[Any]:
    """Segments that a kernel is launched for, and what else it is given."""
    info = LoRABatchInfo(
        graph, 1, None, torch.zeros(522), torch.arange(521), torch.zeros(9), torch.zeros(9), 16, None, None
    )
    got: dict[str, Any] = {}
    segments_in_use.narrowed(lambda **given: got.update(given), torch.zeros(tokens, 2), "weights", info, num_slices=3)
    assert len(info.weight_indices) == 521
    assert got["batch_info"].seg_indptr is info.seg_indptr
    assert got["batch_info"].weight_indices.data_ptr() == info.weight_indices.data_ptr()
    return [len(got["batch_info"].weight_indices), len(got["x"]), got["weights"], got["num_slices"]]


def segments() -> dict[str, Any]:
    slots = itertools.product(range(0, 40, 3), (0, 1, 15, 16, 17, 33, 128, 129), (0, 1, 16, 31), (16, 32, 128))
    return {
        "launched": {tokens: launched(tokens, graph=True)[0] for tokens in (1, 7, 64, 2262, 8192)},
        "more": launched(7, graph=True)[1:],
        "eager": launched(7, graph=False)[0],
        "too few": [
            (tokens, chunk)
            for *tokens, chunk in slots
            if sum(-(-each // chunk) for each in tokens) > segments_in_use.most(sum(tokens), 3)
        ],
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        seen = {"staging": staging(folder), "reading": reading(folder)}
    print(json.dumps(seen | {"walked": walked(), "segments": segments()}))


if __name__ == "__main__":
    main()
