"""Adapters that are refused, each by its own name and with what to do; and those that are let through."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from tests.unit.serve.raw_tensors import write_raw
from tuneship.core.errors import ArtifactError, PreflightError
from tuneship.core.model_source import ModelSource
from tuneship.serve import preflight, tensors
from tuneship.serve.preflight import CheckedAdapter, Limits

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
LAYER_1 = "base_model.model.model.layers.1"
Q_A = f"{LAYER_1}.self_attn.q_proj.lora_A.weight"
Q_B = f"{LAYER_1}.self_attn.q_proj.lora_B.weight"


# Tensors


@pytest.mark.parametrize("modules", [ATTENTION + MLP, ("self_attn.q_proj", "self_attn.v_proj"), MLP], ids=len)
def test_whole_adapters_are_served_from_where_they_lie(make_adapter, check, modules):
    path = make_adapter("sql", modules=modules)
    assert check(path) == CheckedAdapter("sql", check(path).content_id, path.resolve())


TENSORS = {
    "no lora_B": (lambda t: t.pop(Q_B), "is not whole: it lacks lora_B of model.layers.1.self_attn.q_proj", "save it"),
    "no lora_A": (lambda t: t.pop(Q_A), "is not whole: it lacks lora_A of model.layers.1.self_attn.q_proj", "save it"),
    "a layer is missing": (
        lambda t: [t.pop(key) for key in list(t) if "layers.1" in key],
        "q_proj has no tensors in 1 of 2 layers (1)",
        "save it",
    ),
    "nothing at all": (lambda t: t.clear(), "has no tensors at all", "save it"),
    "another shape": (
        lambda t: t.update({Q_A: np.ones((4, 16), np.float32)}),
        f"does not fit the-base: {Q_A} is (4, 16), the base and rank 4 want (4, 8)",
        "the base that it was trained on",
    ),
    "transposed": (lambda t: t.update({Q_A: t[Q_A].T.copy()}), f"{Q_A} is (8, 4)", "the base that it was trained on"),
    "another rank than it says": (
        lambda t: t.update({Q_A: np.ones((2, 8), np.float32), Q_B: np.ones((8, 2), np.float32)}),
        "want (4, 8) and 1 more",
        "the base that it was trained on",
    ),
    "a layer too many": (
        lambda t: t.update({Q_A.replace("layers.1", "layers.7"): t[Q_A]}),
        "the-base has nothing for base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight",
        "the base that it was trained on",
    ),
    "DoRA's magnitude, unannounced": (
        lambda t: t.update({Q_A.replace("lora_A.weight", "lora_magnitude_vector"): np.ones(8, np.float32)}),
        "no lora_A or lora_B, which SGLang drops or misreads",
        "merge it",
    ),
    "a bias of lora_B, unannounced": (
        lambda t: t.update({Q_B.replace(".weight", ".bias"): np.ones(8, np.float32)}),
        "q_proj.lora_B.bias",
        "merge it",
    ),
    "a module saved whole": (
        lambda t: t.update({"base_model.model.lm_head.weight": np.ones((16, 8), np.float32)}),
        "base_model.model.lm_head.weight",
        "merge it",
    ),
    "an embedding": (
        lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": np.ones((4, 16), np.float32)}),
        "embed_tokens.lora_embedding_A",
        "merge it",
    ),
    "names as in the running model": (
        lambda t: [t.update({key.replace(".weight", ".default.weight"): t.pop(key)}) for key in list(t)],
        "lora_A.default.weight",
        "save_pretrained",
    ),
    "the same twice": (
        lambda t: t.update({Q_A.removeprefix("base_model.model."): t[Q_A]}),
        "has tensors twice",
        "save_pretrained",
    ),
    "the head": (
        lambda t: t.update(
            {
                "base_model.model.lm_head.lora_A.weight": np.ones((4, 8), np.float32),
                "base_model.model.lm_head.lora_B.weight": np.ones((16, 4), np.float32),
            }
        ),
        "changes lm_head; the server wraps q_proj",
        "merge it",
    ),
    "half of what is stacked, in one layer": (
        lambda t: [t.pop(key) for key in list(t) if "layers.1.self_attn.v_proj" in key],
        "changes q_proj without v_proj",
        "merge it",
    ),
    "eight bits": (lambda t: t.update({Q_A: np.ones((4, 8), np.int8)}), f"{Q_A} (I8)", "bfloat16"),
    "NaN": (lambda t: t[Q_A].__setitem__((3, 7), np.nan), f"has NaN or infinity in {Q_A}", "earlier checkpoint"),
    "infinity": (lambda t: t[Q_B].__setitem__((0, 0), -np.inf), f"has NaN or infinity in {Q_B}", "earlier checkpoint"),
}


@pytest.mark.parametrize(("change", "says", "hint"), TENSORS.values(), ids=TENSORS.keys())
def test_tensors_that_cannot_be_served(make_adapter, refusal, change, says: str, hint: str):
    error = refusal(make_adapter("sql", change=change))
    assert says in error.message
    assert hint in error.hint
    assert "'sql'" in error.message


def test_the_base_that_the_settings_name_is_told_when_shapes_differ(make_adapter, refusal):
    named = {"base_model_name_or_path": "org/other"}
    path = make_adapter("sql", config=named, change=lambda t: t.update({Q_A: np.ones((4, 16), np.float32)}))
    assert "org/other" in refusal(path).hint


@pytest.mark.parametrize("dtype", tensors.FLOATS)
@pytest.mark.parametrize("bad", [None, "inf", "-inf", "nan"])
def test_every_float_is_looked_at_bit_by_bit(make_adapter, check, refusal, dtype: str, bad: str | None):
    path = make_adapter("sql")
    with safe_open(path / "adapter_model.safetensors", "numpy") as opened:
        values = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - no mapping
    if bad:
        values[Q_A][2, 3] = float(bad)
    packed = {key: {"dtype": dtype, "shape": list(v.shape), "data": PACK[dtype](v)} for key, v in values.items()}
    write_raw(packed, path / "adapter_model.safetensors")
    if bad:
        assert f"has NaN or infinity in {Q_A}" in refusal(path).message
    else:
        assert check(path).remarks == ()


PACK: dict[str, Callable[[np.ndarray], bytes]] = {
    "F32": lambda value: value.tobytes(),
    "F16": lambda value: value.astype(np.float16).tobytes(),
    "BF16": lambda value: (value.view(np.uint32) >> 16).astype(np.uint16).tobytes(),
}


@settings(max_examples=200)
@given(bits=st.integers(0, 0xFFFF), dtype=st.sampled_from(["F16", "BF16"]))
def test_finite_and_zero_are_what_ieee_says(tmp_path_factory, bits: int, dtype: str):
    file = tmp_path_factory.mktemp("values") / "one.safetensors"
    write_raw({"x": {"dtype": dtype, "shape": [1], "data": struct.pack("<H", bits)}}, file)
    value = (
        np.array([bits], np.uint16).view(np.float16)
        if dtype == "F16"
        else np.array([bits << 16], np.uint32).view(np.float32)
    )
    assert tensors.read(file).values["x"] == (bool(np.isfinite(value[0])), bool(value[0] == 0))


def test_large_tensors_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tensors, "_BLOCK", 28)
    values = np.zeros(100, np.float32)
    values[99] = np.inf
    write_raw({"x": {"dtype": "F32", "shape": [100], "data": values.tobytes()}}, tmp_path / "x.safetensors")
    assert tensors.read(tmp_path / "x.safetensors").values["x"] == (False, False)


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_an_adapter_that_changes_nothing_is_let_through_with_a_remark(make_adapter, check, half: str):
    path = make_adapter("sql", change=lambda t: t.update({key: 0 * value for key, value in t.items() if half in key}))
    assert check(path).remarks == ("adapter 'sql' changes nothing: its answers are the base's",)


@pytest.mark.parametrize("module", ["mlp.experts.0.gate_proj", "cross_attn.q_proj"])
def test_modules_that_sglang_would_take_for_others(base: Path, make_adapter, module: str):
    def also(tensors: dict) -> None:
        for layer in (0, 1):
            key = f"base_model.model.model.layers.{layer}.{module}"
            tensors |= {f"{key}.lora_A.weight": np.ones((4, 8), np.float32)}
            tensors |= {f"{key}.lora_B.weight": np.ones((8, 4), np.float32)}

    facts = preflight.read_base(ModelSource("the-base", "", base))
    facts.linear.update({f"model.layers.{layer}.{module}": (8, 8) for layer in (0, 1)})
    with pytest.raises(PreflightError, match=r"only right below a decoder's block|several q_proj in one layer"):
        preflight.check(make_adapter("sql", change=also), facts)


def test_another_towers_modules_are_not_the_decoders(base: Path, make_adapter):
    vision = "vision_tower.encoder.layers.1.self_attn.q_proj"
    facts = preflight.read_base(ModelSource("the-base", "", base))
    facts.linear[vision] = (8, 8)
    path = make_adapter("sql", change=lambda t: t.update({f"base_model.model.{vision}.lora_A.weight": t[Q_A]}))
    with pytest.raises(PreflightError, match="only right below a decoder's block"):
        preflight.check(path, facts)


def test_a_base_packed_by_bitsandbytes_has_its_true_shapes(base: Path, tmp_path: Path):
    module, state = "model.layers.0.self_attn.k_proj", json.dumps({"shape": [4, 8], "quant_type": "nf4"}).encode()
    packed = {
        f"{module}.weight": {"dtype": "U8", "shape": [16, 1], "data": bytes(16)},
        f"{module}.weight.absmax": {"dtype": "F32", "shape": [1], "data": bytes(4)},
        f"{module}.weight.quant_state.bitsandbytes__nf4": {"dtype": "U8", "shape": [len(state)], "data": state},
    }
    write_raw(packed, base / "model.safetensors")
    assert preflight.read_base(ModelSource("the-base", "", base)).linear == {module: (4, 8)}


@pytest.mark.parametrize("state", [b"{", b"[]", b"{}", b'{"shape": [1]}', b'{"shape": ["a", 2]}', b"\xff"], ids=repr)
def test_a_packed_weight_whose_state_is_broken_is_refused(base: Path, state: bytes):
    name = "model.layers.0.self_attn.k_proj.weight"
    packed = {
        name: {"dtype": "U8", "shape": [16, 1], "data": bytes(16)},
        f"{name}.quant_state.bitsandbytes__nf4": {"dtype": "U8", "shape": [len(state)], "data": state},
    }
    write_raw(packed, base / "model.safetensors")
    with pytest.raises(ArtifactError, match="names no shape"):
        preflight.read_base(ModelSource("the-base", "", base))


@pytest.mark.parametrize(("dtype", "width"), [("I64", 8), ("I32", 4)])
def test_a_base_packed_by_compressed_tensors_has_its_true_shapes(base: Path, dtype: str, width: int):
    module = "model.layers.0.self_attn.k_proj"
    sizes = b"".join(size.to_bytes(width, "little") for size in (4, 64))
    packed = {
        f"{module}.weight_packed": {"dtype": "I32", "shape": [4, 8], "data": bytes(128)},
        f"{module}.weight_scale": {"dtype": "BF16", "shape": [4, 1], "data": bytes(8)},
        f"{module}.weight_shape": {"dtype": dtype, "shape": [2], "data": sizes},
    }
    write_raw(packed, base / "model.safetensors")
    assert preflight.read_base(ModelSource("the-base", "", base)).linear == {module: (4, 64)}


# Settings


def test_every_reason_is_told_at_once(make_adapter, refusal):
    path = make_adapter("sql", rank=16, config={"use_dora": True, "bias": "all"}, change=lambda t: t.pop(Q_B))
    error = refusal(path, Limits(max_rank=8))
    assert error.message.startswith("adapter 'sql' cannot be served, for 4 reasons. It\n  - sets bias = all: ")
    for fact in ("use_dora", "has rank 16, the server takes at most 8", "lacks lora_B"):
        assert fact in error.message
    assert "restart with --max-rank 16" in error.hint
    assert error.hint.count("merge it") == 1


def test_the_modules_that_the_server_wraps_are_its_limit(make_adapter, check, refusal):
    path = make_adapter("sql", modules=(*ATTENTION, "mlp.down_proj"))
    assert check(path)
    error = refusal(path, Limits(target_modules=("q_proj", "k_proj", "v_proj", "o_proj")))
    assert error.message == "adapter 'sql' changes down_proj; the server wraps q_proj, k_proj, v_proj, o_proj"


@pytest.mark.parametrize(
    "config",
    [
        "{",
        "[]",
        "{}",
        json.dumps({"r": "x", "lora_alpha": 1, "peft_type": "LORA", "target_modules": []}),
        json.dumps({"r": True, "lora_alpha": 1, "peft_type": "LORA", "target_modules": []}),
        json.dumps({"r": 0, "lora_alpha": 1, "peft_type": "LORA", "target_modules": []}),
        json.dumps({"r": 4, "lora_alpha": float("nan"), "peft_type": "LORA", "target_modules": []}),
        json.dumps({"r": 4, "lora_alpha": 8, "peft_type": "LORA", "target_modules": None}),
        json.dumps({"r": 4, "lora_alpha": 8, "peft_type": "LORA", "target_modules": "(q_proj"}),
        json.dumps({"r": 4, "lora_alpha": 8, "peft_type": "LORA", "target_modules": [], "rank_pattern": [1]}),
        json.dumps({"r": 4, "lora_alpha": 8, "peft_type": "LORA", "target_modules": "a{99999999999999999999}"}),
        json.dumps({"r": 4, "lora_alpha": 8, "peft_type": "LORA", "target_modules": [], "rank_pattern": {"(?i)q": 4}}),
        json.dumps(
            {
                "r": 4,
                "lora_alpha": 8,
                "peft_type": "LORA",
                "target_modules": [],
                "layers_to_transform": [0],
                "layers_pattern": "(?i)layers",
            }
        ),
        json.dumps({"r": 10**400, "lora_alpha": 8, "peft_type": "LORA", "target_modules": [], "use_rslora": True}),
        json.dumps(
            {
                "r": 4,
                "lora_alpha": 8.5,
                "peft_type": "LORA",
                "target_modules": ["q_proj", "v_proj"],
                "rank_pattern": {"q_proj": 10**400},
            }
        ),
        "[" * 100_000,
    ],
    ids=lambda text: text[:60],
)
def test_settings_that_are_none(make_adapter, check, config: str):
    path = make_adapter("sql")
    (path / "adapter_config.json").write_text(config)
    with pytest.raises(ArtifactError, match="is not an adapter's configuration"):
        check(path)


def test_a_layer_that_was_not_to_be_trained_is_not_missing(make_adapter, check):
    path = make_adapter(
        "sql",
        config={"layers_to_transform": [0]},
        change=lambda t: [t.pop(key) for key in list(t) if "layers.1" in key],
    )
    assert check(path).path == path.resolve()
