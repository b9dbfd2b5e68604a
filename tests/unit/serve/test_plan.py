"""A server's memory on a card or a CPU: SGLang's rule, and arithmetic that adds up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneship.core.errors import PlanError
from tuneship.core.hardware import Gpu, Hardware
from tuneship.core.recipe import Serve
from tuneship.core.shape import Shape
from tuneship.serve import plan
from tuneship.serve.footprint import Facts
from tuneship.serve.plan import ServingPlan

GIB = 2**30
H100_BYTES = 81_559 << 20
CPU = Hardware((), "", "a processor", 2, 24 * GIB)
SMOLLM2 = Facts(
    shape=Shape(hidden=576, intermediate=1536, layers=30, heads=9, kv_heads=3, head_dim=64, vocab=49152, tied=True),
    context_length=8192,
    matrices=((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)) * 30,
    others=49152 * 576 + 61 * 576,
    stored="none",
    double=False,
    stored_bytes=269_030_016,
)
BASELINE = Path(__file__).parents[3] / "bench" / "baselines" / "load-h100.json"


def card(count: int) -> Hardware:
    return Hardware((Gpu("a card", count, (9, 0)),), "580", "a processor", 16, 64 * GIB)


def planned(machine: Hardware, mode: Any = "adapters", quantization: Any = "none", **serve: Any) -> ServingPlan:
    return plan.make(SMOLLM2, Serve(**serve), machine, mode=mode, quantization=quantization, needed_tokens=8192)


@pytest.mark.parametrize(
    ("mib", "share"), [(8_192, 0.504), (24_564, 0.833), (40_960, 0.823), (81_559, 0.83), (183_359, 0.854)]
)
def test_the_share_of_a_card_is_sglangs(mib: int, share: float):
    """The figures are of SGLang's own function: tests/integration/test_plan_memory.py asks it again."""
    assert plan.memory_fraction(mib) == share


def test_what_a_card_held_under_load_lies_between_what_is_planned_and_the_card():
    """SmolLM2, merged, on one H100 under load; NVML's peaks of each level."""
    measured = json.loads(BASELINE.read_text())
    peaks = [value for level in measured["levels"] for value in _found(level, "memory_peak_bytes")]
    assert len(peaks) > 5
    found = planned(card(H100_BYTES), mode="merged")
    static = found.runtime_bytes + found.weights_bytes + found.kv_bytes
    assert all(static <= peak <= static + found.reserve_bytes for peak in peaks), (static, peaks)


def _found(tree: Any, key: str) -> list[int]:
    if isinstance(tree, dict):
        return [tree[key]] if key in tree else [n for value in tree.values() for n in _found(value, key)]
    return [n for value in tree for n in _found(value, key)] if isinstance(tree, list) else []


@given(
    st.integers(4, 200),
    st.sampled_from(["merged", "adapters"]),
    st.sampled_from(["none", "nf4", "fp8"]),
    st.integers(1, 64),
    st.integers(1, 256),
)
def test_the_terms_never_add_up_to_more_than_the_card(gib: int, mode: str, quantization: str, loras: int, rank: int):
    found = planned(card(gib * GIB), mode, quantization, max_loras=loras, max_rank=rank)
    terms = found.weights_bytes + found.slots_bytes + found.kv_bytes + found.reserve_bytes + found.runtime_bytes
    assert found.kv_tokens == 0 or terms <= found.device_bytes
    assert found.slots == (loras + 1 if mode == "adapters" else 0)


@pytest.mark.parametrize(
    "less", [{"max_loras": 4}, {"max_rank": 8}, {"quantization": "nf4"}, {"mode": "merged"}, {"memory_fraction": 0.9}]
)
def test_each_way_to_save_leaves_more_tokens(less: dict[str, Any]):
    assert planned(card(16 * GIB), **less).kv_tokens > planned(card(16 * GIB)).kv_tokens


def test_float32_takes_twice():
    found, wide = planned(card(16 * GIB)), planned(card(16 * GIB), dtype="float32")
    assert wide.weights_bytes == 2 * found.weights_bytes
    assert wide.slots_bytes == 2 * found.slots_bytes
    assert 2 * wide.kv_tokens < found.kv_tokens


def test_the_smallest_of_several_cards_decides():
    two = card(80 * GIB)._replace(gpus=(*card(80 * GIB).gpus, *card(24 * GIB).gpus))
    assert planned(two).device_bytes == 24 * GIB


def test_a_cpu_has_the_tokens_that_its_engine_is_given():
    found = planned(CPU)
    assert (found.device, found.kv_tokens, found.fits) == ("CPU", 20_000, True)
    assert not planned(CPU._replace(memory_bytes=5 * GIB)).fits


def test_streams_of_a_length():
    found = planned(card(16 * GIB))
    assert found.streams(4096) == found.kv_tokens // 4096
    assert found.streams(1) == 2048


def test_a_model_over_several_cards_is_not_planned():
    with pytest.raises(PlanError, match="several GPUs"):
        planned(card(16 * GIB), extra_args=("--tp", "2"))
