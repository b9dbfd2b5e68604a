"""How an engine of ours reads an adapter, moves it into a slot, and starts kernels for it: beside what SGLang does."""

from __future__ import annotations

import re

import pytest

from tests.unit.serve.installed import run_python, sglang_source

PROGRAM = """
import itertools, json, tempfile, torch
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock
from safetensors.torch import save_file

(ours,) = [entry for entry in entry_points(group="sglang.srt.plugins") if entry.name == "tuneship"]
ours.load()()

from tuneship.serve.sglang_plugin.adapter_reading import read_as_it_is
written = {
    "a.lora_A": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    "b.lora_B": torch.randn(4, 2),
    "c.none": torch.empty(0, 3),
    "d.half": torch.randn(5).half(),
}
events, read = [], {}
with tempfile.TemporaryDirectory() as folder:
    save_file(written, f"{folder}/adapter_model.safetensors")
    file = Path(folder, "adapter_model.safetensors")
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["e.odd"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(raw) - 8 - length, len(raw) - 4 - length]}
    padded = json.dumps(header).encode()
    padded += b" " * (-len(padded) % 8)
    data = raw[8 + length :] + torch.tensor([0.5]).numpy().tobytes()
    file.write_bytes(len(padded).to_bytes(8, "little") + padded + data)
    adapter = SimpleNamespace(
        config=SimpleNamespace(path=folder),
        base_model=torch.nn.Linear(1, 1),
        _process_weight=lambda name, tensor: read.update({name: tensor}),
        _normalize_weights=lambda: events.append(sorted(read)),
    )
    read_as_it_is(None, adapter)
    odd = read.pop("e.odd").item()
    same = {name: [str(t.dtype), list(t.shape), bool(torch.equal(t, written[name]))] for name, t in read.items()}
reading = {"events": events, "same": same, "odd": odd}

from sglang.srt.lora.lora import LoRAAdapter
from sglang.srt.lora.lora_config import LoRAConfig
from tuneship.serve.sglang_plugin import adapter_staging

class Base(torch.nn.Linear):
    walks = 0

    def named_modules(self, *given, **named):
        Base.walks += 1
        return super().named_modules(*given, **named)

def walked(base=Base(1, 1)):
    found = [LoRAAdapter._build_moe_gated_map(base) for _ in range(3)]
    return [found, Base.walks]

def adapter_of(folder, base=torch.nn.Linear(1, 1)):
    return LoRAAdapter("uid", LoRAConfig(folder), SimpleNamespace(num_hidden_layers=2), None, None, base_model=base)

def moved(adapter, pool="pool"):
    def original(*given):
        weights = [dict(layer.weights) for layer in given[3].layers]
        return {"given": [*given[:3], *given[4:]], "weights": weights}

    return adapter_staging.move(original, pool, "uid", 3, adapter, "modules")

def same(one, other):
    return [sorted(each) for each in one] == [sorted(each) for each in other] and all(
        torch.equal(tensor, there[name]) for each, there in zip(one, other) for name, tensor in each.items()
    )

shapes = {"q_proj": (8, 8), "k_proj": (4, 8), "v_proj": (4, 8), "o_proj": (8, 8)}
shapes |= {"gate_proj": (6, 8), "up_proj": (6, 8), "down_proj": (8, 6)}
written = {}
for layer in range(2):
    for name, (rows, columns) in shapes.items():
        key = f"base_model.model.model.layers.{layer}.x.{name}"
        kind = torch.float32 if name == "o_proj" else torch.bfloat16
        written[f"{key}.lora_A.weight"] = torch.randn(2, columns).to(kind)
        written[f"{key}.lora_B.weight"] = torch.randn(rows, 2).to(kind)
with tempfile.TemporaryDirectory() as folder:
    save_file(written, f"{folder}/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": list(shapes)}
    Path(folder, "adapter_config.json").write_text(json.dumps(config))
    theirs = adapter_of(folder)
    theirs.initialize_weights_from_tensors(written)
    arranged = [layer.weights for layer in theirs.layers]
    ours = adapter_of(folder)
    ours.initialize_weights()
    mapped = [dict(layer.weights) for layer in ours.layers]
    ahead = len(adapter_staging._ahead)
    first, again = moved(ours), moved(ours)
    late = adapter_of(folder)
    late.initialize_weights()
    adapter_staging._ahead.clear()  # another one was read since
    sent, adapter_staging._sent = adapter_staging._sent, MagicMock(side_effect=torch.OutOfMemoryError)
    no_room = moved(ours)
    adapter_staging._sent, adapter_staging.MOST_BYTES = sent, 100
    large = adapter_of(folder)
    large.initialize_weights()
    short = torch.zeros(64, dtype=torch.uint8).numpy()
    try:
        adapter_staging._read(Path(folder, "adapter_config.json"), short.repeat(99), slice(8, 6000))
    except OSError as error:
        cut = str(error)
staging = {
    "given": first["given"],
    "read ahead": ahead,
    "as theirs": {
        "first": same(first["weights"], arranged),
        "again": same(again["weights"], arranged),
        "late": same(moved(late)["weights"], arranged),
        "no room": same(no_room["weights"], arranged),
        "large": same([layer.weights for layer in large.layers], arranged),
        "theirs": same(moved(theirs)["weights"], arranged),
    },
    "kept": same(mapped, [layer.weights for layer in ours.layers]) and not same(mapped, arranged),
    "the base": moved(SimpleNamespace(layers=[]))["weights"],
    "walked": walked(),
    "cut": cut.rpartition("/")[2],
}

from sglang.srt.lora.utils import LoRABatchInfo
from tuneship.serve.sglang_plugin import segments_in_use

def launched(tokens, graph):
    info = LoRABatchInfo(
        graph, 1, None, torch.zeros(522), torch.arange(521), torch.zeros(9), torch.zeros(9), 16, None, None
    )
    got = {}
    segments_in_use.narrowed(lambda **given: got.update(given), torch.zeros(tokens, 2), "weights", info, num_slices=3)
    assert len(info.weight_indices) == 521 and got["batch_info"].seg_indptr is info.seg_indptr
    assert got["batch_info"].weight_indices.data_ptr() == info.weight_indices.data_ptr()
    return [len(got["batch_info"].weight_indices), len(got["x"]), got["weights"], got["num_slices"]]

segments = {
    "launched": {tokens: launched(tokens, True)[0] for tokens in (1, 7, 64, 2262, 8192)},
    "more": launched(7, True)[1:],
    "eager": launched(7, False)[0],
    "too few": [
        tokens
        for tokens in itertools.product(range(0, 40, 3), (0, 1, 15, 16, 17, 33), (0, 1, 16, 31))
        if sum(-(-each // 16) for each in tokens) > segments_in_use.most(sum(tokens), 3)
    ],
}

print(json.dumps({"reading": reading, "staging": staging, "segments": segments}))
"""


@pytest.fixture(scope="module")
def in_ours() -> dict:
    """What `PROGRAM` finds in one process that is an engine of ours: SGLang takes 10 s to import."""
    return run_python(PROGRAM, TUNESHIP_ENGINE="1")


def test_upstream_still_reads_adapters_in_their_bases_format():
    """When this fails, try NF4 with an adapter without `adapter_reading.py`."""
    assert "DefaultModelLoader(self.load_config)" in sglang_source("lora/lora.py")


def test_an_adapter_is_read_as_it_is(in_ours):
    read = in_ours["reading"]
    assert read["events"] == [["a.lora_A", "b.lora_B", "c.none", "d.half", "e.odd"]], "arranged when all are there"
    assert read["same"] == {
        "a.lora_A": ["torch.bfloat16", [2, 3], True],
        "b.lora_B": ["torch.float32", [4, 2], True],
        "c.none": ["torch.float32", [0, 3], True],
        "d.half": ["torch.float16", [5], True],
    }
    assert read["odd"] == 0.5, "a tensor that begins between two of its values"


def test_upstream_still_arranges_an_adapter_after_it_has_read_it():
    """When this fails, let `adapter_reading.py` do what `initialize_weights` does now."""
    reading = sglang_source("lora/lora.py").split("def initialize_weights(self):", 1)[1].split("\n    def ", 1)[0]
    assert reading.count("self.") == len(["config.path", "load_config", "config.hf_config", "_process", "_normalize"])
    assert "self._process_weight(name, loaded_weight)\n\n        self._normalize_weights()" in reading


def test_an_adapter_is_moved_as_sglang_would_have_arranged_it(in_ours):
    staging = in_ours["staging"]
    assert staging["as theirs"] == dict.fromkeys(["first", "again", "late", "no room", "large", "theirs"], True)
    assert staging["given"] == ["pool", "uid", 3, "modules"]
    assert staging["kept"], "what lies in memory is the file"
    assert staging["read ahead"] == 1
    assert staging["the base"] == []


def test_a_file_that_ends_too_early_is_not_moved(in_ours):
    assert re.fullmatch(r"adapter_config\.json ends 5\d\d\d bytes too early", in_ours["staging"]["cut"])


def test_a_base_is_walked_once(in_ours):
    assert in_ours["staging"]["walked"] == [[{}] * 3, 1]


def test_upstream_still_walks_the_base_for_every_adapter():
    """When this fails, drop `walk_once` of `adapter_reading.py`."""
    assert "self._build_moe_gated_map(base_model) if base_model is not None else {}" in sglang_source("lora/lora.py")


def test_upstream_still_moves_an_adapter_tensor_by_tensor():
    """When this fails, time a load without `adapter_staging.py`."""
    source = sglang_source("lora/mem_pool.py")
    sending = source.split("def _get_maybe_cached_weight_for_transfer", 1)[1].split("\n    def ", 1)[0]
    assert 'or weight.device.type != "cpu"' in sending, "what is on the GPU is taken as it is"
    assert "if not self.enable_lora_overlap_loading:\n            return weight.pin_memory()" in sending
    moving = source.split("def load_lora_weight_to_buffer", 1)[1]
    assert "layer_weights = layer.weights" in moving


def test_a_graph_launches_the_segments_that_its_tokens_can_have(in_ours):
    segments = in_ours["segments"]
    assert segments["launched"] == {"1": 1, "7": 7, "64": 13, "2262": 150, "8192": 521}
    assert segments["more"] == [7, "weights", 3]
    assert segments["eager"] == 521
    assert segments["too few"] == []


@pytest.mark.parametrize("kernel", ["shrink", "expand"])
def test_upstream_still_launches_for_the_largest_graph(kernel):
    """When this fails, time prefill with adapters without `segments_in_use.py`."""
    source = sglang_source(f"../kernels/ops/gemm/chunked_sgmv_{kernel}.py")
    assert (
        "batch_info.weight_indices.shape[0]\n        if batch_info.use_cuda_graph\n        else num_segments" in source
    )
    assert "if pid_s >= num_segs:\n        return" in source
    assert "MIN_CHUNK_SIZE = 16" in sglang_source("lora/backend/chunked_backend.py")
