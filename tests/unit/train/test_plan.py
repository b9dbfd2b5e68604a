"""The planner fills the device at the same effective batch, and refuses what cannot fit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneship.core.errors import PlanError
from tuneship.core.hardware import Gpu, Hardware
from tuneship.core.recipe import Recipe
from tuneship.core.shape import Shape
from tuneship.train.plan import Plan, estimate_bytes, make

GIB = 2**30
QWEN_1_5B = Shape(
    hidden=1536, intermediate=8960, layers=28, heads=12, kv_heads=2, head_dim=128, vocab=151936, tied=True
)


def recipe(**train) -> Recipe:
    return Recipe.model_validate({"model": {"id": "m"}, "data": {"train": "t"}, "train": train})


def card(gib: float) -> Hardware:
    return Hardware((Gpu("card", int(gib * GIB), (8, 0)),), "1", "cpu", 2, 64 * GIB)


def plan_on(gib: float, longest: int = 1024, **train) -> Plan:
    return make(recipe(**train), QWEN_1_5B, card(gib), rows=1600, tokens=10**6, longest=longest)


def test_the_shape_is_read_from_a_config():
    config = {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    }  # fmt: skip
    shape = Shape.of(config)
    # SmolLM2-135M: 134.5 million parameters, of which 28.3 are the tied embedding.
    assert shape.linear_parameters + shape.embedding_parameters == pytest.approx(134.5e6, rel=0.01)
    assert Shape.of({"text_config": config}) == shape


@pytest.mark.parametrize(
    ("tokens", "checkpointing", "measured_gib"),
    [(16 * 1024, True, 4.6), (64 * 1024, True, 14.8), (16 * 1024, False, 43.4)],
)
def test_the_estimate_agrees_with_what_was_measured_on_an_h100(tokens, checkpointing, measured_gib):
    estimate = estimate_bytes(recipe(), QWEN_1_5B, tokens, checkpointing=checkpointing)
    assert estimate / GIB == pytest.approx(measured_gib, rel=0.15)


def test_a_large_card_needs_no_checkpointing():
    plan = plan_on(80)
    assert (plan.micro_batch, plan.accumulation, plan.checkpointing) == (16, 1, False)


def test_a_small_card_checkpoints_before_it_accumulates():
    plan = plan_on(12)
    assert (plan.micro_batch, plan.accumulation, plan.checkpointing) == (16, 1, True)


def test_a_smaller_card_accumulates_to_the_same_effective_batch():
    plan = plan_on(4)
    assert plan.accumulation > 1
    assert plan.micro_batch * plan.accumulation == 16


def test_what_cannot_fit_is_refused_with_a_hint():
    with pytest.raises(PlanError) as caught:
        plan_on(1)
    assert "rows of 1024 tokens need about" in caught.value.message
    assert "data.max_length" in caught.value.hint


def test_a_set_micro_batch_is_kept():
    assert plan_on(80, micro_batch=4).micro_batch == 4


def test_steps_come_from_epochs_or_are_given():
    assert plan_on(80, epochs=2.0).steps == 200
    assert plan_on(80, steps=7).steps == 7


@given(st.integers(1, 100_000), st.integers(1, 100_000), st.booleans())
def test_more_tokens_never_need_less(a, b, checkpointing):
    low, high = sorted((a, b))
    assert estimate_bytes(recipe(), QWEN_1_5B, low, checkpointing=checkpointing) <= estimate_bytes(
        recipe(), QWEN_1_5B, high, checkpointing=checkpointing
    )
