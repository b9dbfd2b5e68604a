"""The planner fills the device at the same effective batch, and refuses what cannot fit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneship.core.errors import PlanError
from tuneship.core.hardware import Gpu, Hardware
from tuneship.core.recipe import Recipe
from tuneship.core.shape import Shape
from tuneship.train.planning.calibration import Calibration, Sample, sizes
from tuneship.train.planning.memory import Setting, estimate
from tuneship.train.planning.plan import Plan, largest, make

GIB = 2**30
QWEN_1_5B = Shape(
    hidden=1536, intermediate=8960, layers=28, heads=12, kv_heads=2, head_dim=128, vocab=151936, tied=True
)
LINES = Calibration(
    28,
    again=(Sample(Setting(4, 0), 3 * GIB, 0.4), Sample(Setting(8, 0), 4 * GIB, 0.7)),
    kept=(Sample(Setting(4, 28), 12 * GIB, 0.3), Sample(Setting(8, 28), 22 * GIB, 0.5)),
)


def recipe(**train) -> Recipe:
    return Recipe.model_validate({"model": {"id": "m"}, "data": {"train": "t"}, "train": train})


def card(gib: float) -> Hardware:
    return Hardware((Gpu("card", int(gib * GIB), (8, 0)),), "1", "cpu", 2, 64 * GIB)


def plan_on(gib: float, longest: int = 1024, measured: Calibration | None = None, **train) -> Plan:
    return make(
        recipe(**train), QWEN_1_5B, card(gib), rows=1600, tokens=10**6, longest=longest, measured=measured
    )  # fmt: skip


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
    ("train", "micro", "kept", "measured_gib"),
    [
        ({"kernels": "peft", "liger": False}, 2, 0, 1.7),
        ({"kernels": "peft", "liger": False}, 16, 0, 4.6),
        ({"kernels": "peft", "liger": False}, 64, 0, 14.8),
        ({"kernels": "peft", "liger": False}, 16, 28, 43.4),
        ({"kernels": "peft"}, 16, 0, 4.2),
        ({}, 16, 0, 3.8),
        ({}, 64, 0, 11.21),
        ({}, 8, 10, 6.56),
        ({}, 4, 28, 7.53),
        ({}, 8, 28, 13.53),
    ],
)
def test_the_estimate_agrees_with_what_was_measured_on_an_h100(train, micro, kept, measured_gib):
    found = estimate(recipe(**train), QWEN_1_5B, Setting(micro, kept), 1024, even=True)
    # PyTorch's peak, which has no CUDA context in it.
    assert (found.total - found.context) / GIB == pytest.approx(measured_gib, rel=0.04)


@pytest.mark.parametrize(("micro", "kept", "measured_gib"), [(64, 0, 17.19), (16, 0, 5.79), (16, 28, 47.57)])
def test_rows_of_unequal_length_take_more_and_so_does_the_process(micro, kept, measured_gib):
    found = estimate(recipe(kernels="peft", liger=False), QWEN_1_5B, Setting(micro, kept), 1024)
    assert found.total / GIB == pytest.approx(measured_gib, rel=0.05)


def test_a_large_card_computes_nothing_again():
    plan = plan_on(80)
    assert (plan.micro_batch, plan.accumulation, plan.checkpointing) == (16, 1, False)


def test_a_card_in_between_keeps_what_fits_at_a_micro_batch_that_still_fills_it():
    plan = plan_on(24)
    assert 0 < plan.kept_layers < 28
    assert plan.micro_batch == 16
    assert plan.estimated_bytes <= plan.budget_bytes


def test_a_small_card_computes_again_before_it_accumulates():
    plan = plan_on(6.5)
    assert (plan.micro_batch, plan.accumulation, plan.checkpointing) == (16, 1, True)


def test_a_smaller_card_accumulates_to_the_same_effective_batch():
    plan = plan_on(4)
    assert plan.accumulation > 1
    assert plan.micro_batch * plan.accumulation == 16


def test_checkpointing_is_what_the_recipe_says():
    assert plan_on(80, checkpointing=True).kept_layers == 0
    assert plan_on(40, checkpointing=False).kept_layers == 28


def test_what_cannot_fit_is_refused_with_the_largest_that_would():
    with pytest.raises(PlanError) as caught:
        plan_on(4, longest=32768)
    assert "1 x 32768 tokens need about" in caught.value.message
    assert caught.value.hint.startswith("the largest that fits: --train.micro_batch 1 --data.max_length ")
    length = int(caught.value.hint.rpartition(" ")[2])
    assert plan_on(4, longest=length).micro_batch == 1
    with pytest.raises(PlanError):
        plan_on(4, longest=length + 1)


def test_a_micro_batch_that_is_too_large_is_refused_with_one_that_is_not():
    with pytest.raises(PlanError) as caught:
        plan_on(8, micro_batch=64, effective_batch=64)
    rows = int(caught.value.hint.rpartition(" ")[2])
    assert 1 < rows < 64
    assert plan_on(8, micro_batch=rows, effective_batch=64).micro_batch == rows


def test_kept_activations_that_do_not_fit_are_refused_with_what_helps():
    with pytest.raises(PlanError) as caught:
        plan_on(12, micro_batch=16, checkpointing=False)
    assert caught.value.hint == "--train.checkpointing auto"


def test_a_base_that_does_not_fit_at_all_says_so():
    with pytest.raises(PlanError) as caught:
        plan_on(1)
    assert "weights alone take 1.2 GiB" in caught.value.hint


def test_a_set_micro_batch_is_kept():
    assert plan_on(80, micro_batch=4).micro_batch == 4


def test_steps_come_from_epochs_or_are_given():
    assert plan_on(80, epochs=2.0).steps == 200
    assert plan_on(80, steps=7).steps == 7


def test_measurements_decide_over_arithmetic():
    # By its lines 16 rows take 42 GiB kept and 3 % of what is beyond 8 rows; twice the 0.5 s of 8 rows.
    plan = plan_on(80, measured=LINES)
    assert (plan.micro_batch, plan.kept_layers) == (16, 28)
    assert plan.estimated_bytes == pytest.approx((22 + 20 * 1.03) * GIB)
    assert plan.step_s == pytest.approx(1.0)
    # Of 15.2 GiB, 16 x 1 could keep 7 layers; 8 x 2 keeps 17, at 0.7 s again and 0.5 s kept.
    smaller = plan_on(16, measured=LINES)
    assert (smaller.micro_batch, smaller.kept_layers) == (8, 17)
    assert smaller.estimated_bytes == (4 * 11 + 22 * 17) * GIB // 28
    assert smaller.step_s == pytest.approx(2 * (0.7 - 0.2 * 17 / 28))


def test_between_two_samples_it_is_their_line():
    assert LINES.peak_bytes(Setting(6, 0)) == 3.5 * GIB
    assert LINES.step_s(Setting(6, 28)) == pytest.approx(0.4)
    assert LINES.step_s(Setting(4, 14)) == pytest.approx(0.35)


def test_hours_are_those_of_the_tokens_that_rows_have():
    plan = plan_on(80, measured=LINES)
    # 100 steps of 16 rows; 625 tokens a row on average, where the probe's had 1,024.
    assert plan.tokens == 10**6
    assert plan.hours == pytest.approx(100 * 1.0 * (10**6 / 1600) / 1024 / 3600)


def test_what_people_read_says_what_was_measured_and_what_was_not():
    by_arithmetic, measured = plan_on(16).table(), plan_on(16, measured=LINES).table()
    assert by_arithmetic["step"] == "16 rows x 1 = 16"
    assert by_arithmetic["memory"].endswith("GiB, by arithmetic")
    assert by_arithmetic["time"].startswith("not known")
    assert measured["step"] == "8 rows x 2 = 16"
    assert measured["computed again"] == "11 of 28 layers (activation checkpointing)"
    assert measured["memory"] == "14.9 GiB, measured"
    assert measured["time"] == "0.02 h"
    assert plan_on(80).table()["computed again"].startswith("none")


def test_what_was_not_measured_is_not_known():
    only_again = LINES._replace(kept=())
    assert plan_on(80, measured=only_again).kept_layers == 0
    one_size = Calibration(28, again=(Sample(Setting(1, 0), 3 * GIB, 0.4),), kept=())
    assert plan_on(80, measured=one_size).micro_batch == 1


@pytest.mark.parametrize(
    ("longest", "most", "expected"),
    [(1024, 64, (4, 16)), (512, 64, (8, 32)), (8192, 64, (2, 8)), (1024, 4, (2, 4)), (1024, 1, (1,)), (64, 6, (3, 6))],
)
def test_a_probe_fills_the_heads_tile_where_it_may(longest, most, expected):
    assert sizes(longest, most) == expected


def test_the_largest_that_is_safe_to_try():
    rows = largest(recipe(effective_batch=64), QWEN_1_5B, 1024, 8 * GIB, kept_layers=0)
    assert estimate(recipe(), QWEN_1_5B, Setting(rows, 0), 1024).total <= 8 * GIB
    assert estimate(recipe(), QWEN_1_5B, Setting(rows + 1, 0), 1024).total > 8 * GIB
    assert largest(recipe(), QWEN_1_5B, 1024, GIB, kept_layers=0) == 0


@given(st.integers(1, 1000), st.integers(1, 1000), st.integers(0, 28), st.sampled_from(["peft", "fused", "auto"]))
def test_more_rows_never_need_less(a, b, kept, kernels):
    low, high = sorted((a, b))
    settings = [Setting(rows, kept) for rows in (low, high)]
    sizes_ = [estimate(recipe(kernels=kernels), QWEN_1_5B, setting, 256).total for setting in settings]
    assert sizes_[0] <= sizes_[1]


@given(st.integers(0, 27), st.integers(1, 64))
def test_more_kept_layers_never_need_less(kept, rows):
    sizes_ = [estimate(recipe(), QWEN_1_5B, Setting(rows, count), 1024).total for count in (kept, kept + 1)]
    assert kept == 27 or sizes_[0] <= sizes_[1]  # the last one saves what the others take while computed again
