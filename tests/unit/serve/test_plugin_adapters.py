"""How an engine of ours reads an adapter, moves it into a slot, and starts kernels for it: beside what SGLang does."""

from __future__ import annotations

import re

import pytest

from tests.unit.serve.installed import run_python, sglang_source


@pytest.fixture(scope="module")
def in_ours() -> dict:
    """What `moved_adapters.py` finds in one process that is an engine of ours."""
    program = "from tests.unit.serve import moved_adapters; moved_adapters.main()"
    return run_python(program, TUNESHIP_ENGINE="1")


def test_upstream_still_reads_adapters_in_their_bases_format():
    """When this fails, try NF4 with an adapter without `adapter_reading.py`."""
    assert "DefaultModelLoader(self.load_config)" in sglang_source("lora/lora.py")


def test_an_adapter_is_read_as_it_is(in_ours):
    read = in_ours["reading"]
    assert read["arranged"] == [["a.lora_A", "b.lora_B", "c.none", "d.half", "e.odd"]], "once, when all are there"
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
    found = in_ours["staging"]["as SGLang arranges them"]
    assert len(found) == 7
    assert all(found.values()), found


def test_what_is_sent_is_what_was_read_ahead_and_what_is_kept_is_the_file(in_ours):
    assert in_ours["staging"]["what was read is what is sent"]
    assert in_ours["staging"]["kept"]


def test_what_cannot_be_sent_in_one_piece_is_not(in_ours):
    assert in_ours["staging"]["the base"] == ["pool", None, 0, None, "modules"]
    assert not in_ours["staging"]["askew"]
    assert in_ours["staging"]["room"] == 8, "also where there is no pinned memory"


def test_a_file_that_ends_too_early_is_not_moved(in_ours):
    assert re.fullmatch(r"adapter_config\.json ends 5\d\d\d bytes too early", in_ours["staging"]["cut"])


def test_a_base_is_walked_once(in_ours):
    assert in_ours["walked"] == [[{}] * 3, 1]


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
