"""Which settings of PEFT can be served as an adapter, by name and value."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneship.core import servable
from tuneship.core.servable import PROJECTIONS

PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": list(PROJECTIONS)}

REFUSED = {
    "peft_type": "LOHA",
    "task_type": "SEQ_CLS",
    "bias": "lora_only",
    "fan_in_fan_out": True,
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [1, 2],
    "use_dora": True,
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "lora_bias": True,
    "target_parameters": ["mlp.experts.down_proj"],
    "layer_replication": [[0, 4], [2, 5]],
    "alora_invocation_tokens": [5, 6],
    "arrow_config": {"top_k": 3},
    "kasa_config": {"beta": 1e-4},
    "monteclora_config": {"samples": 2},
    "velora_config": {"num_groups": 64},
    "megatron_config": {"tensor_model_parallel_size": 2},
}
HARMLESS = {
    "auto_mapping": {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True},
    "base_model_name_or_path": "unsloth/llama-3-8b-bnb-4bit",
    "corda_config": {"corda_method": "ipm"},
    "ensure_weight_tying": True,
    "eva_config": {"rho": 1.0},
    "exclude_modules": ["lm_head"],
    "inference_mode": True,
    "layers_pattern": "layers",
    "layers_to_transform": [0],
    "loftq_config": {"loftq_bits": 4},
    "lora_dropout": 0.05,
    "lora_ga_config": {"direction": "ArB2r"},
    "megatron_core": "megatron.core",
    "peft_version": "0.99.0",
    "qalora_group_size": 16,
    "revision": "main",
    "rank_pattern": {"q_proj": 16},
    "alpha_pattern": {"q_proj": 8.5},
    "use_rslora": True,
    "target_modules": "all-linear",
    "bias": "none",
    "task_type": "CAUSAL_LM",
    "runtime_config": {"ephemeral_gpu_offload": False},
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_the_server_would_answer_otherwise_is_refused_by_name(key: str):
    (reason,) = servable.unserved({**PLAIN, key: REFUSED[key]})
    assert key in reason.fact
    assert reason.fix


@pytest.mark.parametrize("key", HARMLESS)
def test_what_changes_no_answer_is_not_asked_about(key: str):
    assert servable.unserved({**PLAIN, key: HARMLESS[key]}) == []


@pytest.mark.parametrize("unset", [None, False, "", [], {}], ids=repr)
@pytest.mark.parametrize("key", [*sorted(servable.KNOWN - PLAIN.keys()), "of_next_year"])
def test_unset_is_unset(key: str, unset: object):
    assert servable.unserved({**PLAIN, key: unset}) == []


@pytest.mark.parametrize("value", [True, 0, 1, "on", [0], {"a": 1}], ids=repr)
def test_a_field_of_a_newer_peft_that_is_set_is_refused(value: object):
    (reason,) = servable.unserved({**PLAIN, "of_next_year": value})
    assert "of_next_year" in reason.fact
    assert "upgrade tuneship" in reason.fix


@pytest.mark.parametrize(
    ("key", "value"), [("a\nb\x1b[2J", 1), ("k" * 10_000, 1), ("new", "a\nb\x1b[2J"), ("bias", "\x1b[2J")]
)
def test_a_field_is_repeated_on_one_line(key: str, value: object):
    """`tuneship merge` ends with the reason as it is."""
    (reason,) = servable.unmerged({**PLAIN, key: value})
    assert reason.fact.isprintable()
    assert reason.fix.isprintable()
    assert len(reason.fact) < 3_000


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "of_next_year"])
def test_a_start_that_changes_the_base_wants_to_be_saved_as_plain_lora(start: str):
    (reason,) = servable.unserved({**PLAIN, "init_lora_weights": start})
    assert start in reason.fact
    assert "path_initial_model_for_weight_conversion" in reason.fix


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "eva", "mica"])
def test_a_start_that_leaves_the_base_alone(start: object):
    assert servable.unserved({**PLAIN, "init_lora_weights": start}) == []


def test_all_reasons_are_given_at_once():
    facts = [reason.fact for reason in servable.unserved({**PLAIN, "use_dora": True, "bias": "all", "lora_bias": True})]
    assert [fact.split()[1] for fact in facts] == ["bias", "lora_bias", "use_dora"]


@pytest.mark.parametrize(
    "modules",
    [
        PROJECTIONS,
        ["q_proj", "v_proj"],  # PEFT's own choice for Llama
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj", "down_proj"],
        ["gate_proj"],
        ["qkv_proj", "gate_up_proj"],  # Phi-3 keeps them so
        [],
    ],
)
def test_modules_that_the_server_wraps(modules: list[str]):
    assert servable.unserved_modules(modules) == []


@pytest.mark.parametrize(
    ("modules", "says"),
    [
        (["q_proj"], ["changes q_proj without v_proj"]),
        (["v_proj"], ["changes v_proj without q_proj"]),
        (["q_proj", "k_proj"], ["changes k_proj without v_proj", "changes q_proj without v_proj"]),
        (["k_proj", "v_proj"], ["changes k_proj without q_proj", "changes v_proj without q_proj"]),
        (["up_proj", "down_proj"], ["changes up_proj without gate_proj"]),
        (["q_proj", "v_proj", "lm_head", "c_attn"], ["changes c_attn, lm_head; the server wraps q_proj"]),
    ],
)
def test_modules_that_it_does_not(modules: list[str], says: list[str]):
    reasons = servable.unserved_modules(modules)
    assert len(reasons) == len(says)
    for reason, words in zip(reasons, says, strict=True):
        assert reason.fact.startswith(words)


def test_a_server_that_wraps_less():
    (reason,) = servable.unserved_modules(["q_proj", "v_proj", "gate_up_proj"], ("q_proj", "k_proj", "v_proj"))
    assert reason.fact == "changes gate_up_proj; the server wraps q_proj, k_proj, v_proj"
    assert servable.unserved_modules(["qkv_proj"], ("q_proj", "k_proj", "v_proj")) == []


FULL = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj", "model.layers.11.self_attn.q_proj")


def fold(config: dict) -> servable.Folding:
    return servable.fold(config, servable.layers(config, FULL))


@given(r=st.integers(1, 1024), alpha=st.floats(1e-3, 1e5), stable=st.booleans())
def test_folding_keeps_the_scaling(r: int, alpha: float, stable: bool):
    config = {**PLAIN, "r": r, "lora_alpha": alpha, "use_rslora": stable}
    folded = fold(config).config
    sglang = folded["lora_alpha"] / folded["r"]
    assert math.isclose(sglang, alpha / (math.sqrt(r) if stable else r), rel_tol=3e-16)
    assert sglang == pytest.approx(servable.scaling(config), rel=3e-16)
    assert not servable.needs_folding(folded)
    assert folded["r"] == r


@given(
    r=st.integers(1, 64),
    stable=st.booleans(),
    ranks=st.dictionaries(
        st.sampled_from(["q_proj", "v_proj", r"layers\.1\w*\.self_attn\.q_proj"]), st.integers(1, 64)
    ),
    alphas=st.dictionaries(st.sampled_from(["q_proj", "layers.0.self_attn.v_proj"]), st.floats(0.1, 1e3)),
)
def test_folding_patterns_keeps_every_scaling(r: int, stable: bool, ranks: dict, alphas: dict):
    config = {**PLAIN, "r": r, "use_rslora": stable, "rank_pattern": ranks, "alpha_pattern": alphas}
    layers = servable.layers(config, FULL)
    folding = servable.fold(config, layers)
    sglang = folding.config["lora_alpha"] / folding.config["r"]
    assert folding.rank == max(layer.rank for layer in layers.values())
    for name, layer in layers.items():
        assert math.isclose(sglang * folding.factors[name], layer.scaling, rel_tol=1e-15)
    assert not servable.needs_folding(folding.config)


def test_of_patterns_the_first_that_fits_the_end_of_the_name_decides():
    config = {**PLAIN, "rank_pattern": {"0.self_attn.q_proj": 2, "q_proj": 4}, "alpha_pattern": {"v": 1, "_proj": 3}}
    assert [tuple(layer) for layer in servable.layers(config, FULL).values()] == [(2, 8), (8, 2), (4, 4)]


def test_an_alpha_of_zero_is_nobody_s_divisor():
    folding = fold({**PLAIN, "alpha_pattern": {"q_proj": 0}})
    assert (folding.config["lora_alpha"], list(folding.factors.values())) == (16, [0, 1, 0])
    assert fold({**PLAIN, "lora_alpha": 0}).factors == dict.fromkeys(FULL, 1)


def test_folding_touches_nothing_else():
    config = {**PLAIN, "target_modules": r".*\.q_proj", "use_rslora": True, "lora_dropout": 0.1, "r": 16}
    folded = fold(config).config
    assert folded == {**config, "target_modules": ["q_proj", "v_proj"], "use_rslora": False, "lora_alpha": 64}
    assert config["use_rslora"], "the original was changed"


@pytest.mark.parametrize(
    ("change", "needs"),
    [
        ({}, False),
        ({"target_modules": ["model.layers.0.self_attn.q_proj", "v_proj", "qkv_proj"]}, False),
        ({"target_modules": "all-linear"}, True),
        ({"target_modules": ".*q_proj"}, True),
        ({"target_modules": ["q_proj", "c_attn"]}, True),  # a list made for several architectures
        ({"use_rslora": True}, True),
        ({"rank_pattern": {"q_proj": 9}}, True),
        ({"alpha_pattern": {"q_proj": 9}}, True),
        ({"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 16.0}}, False),  # what holds anyway
    ],
    ids=str,
)
def test_what_needs_folding(change: dict, needs: bool):
    assert servable.needs_folding({**PLAIN, **change}) is needs
