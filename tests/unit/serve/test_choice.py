"""Merged or adapters: the rule, and what is refused before any training."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.layer_shapes import layer_matrices
from tests.unit.serve.raw_tensors import write_raw
from tuneship.core.errors import PlanError, PreflightError, TuneshipError
from tuneship.core.hardware import Gpu, Hardware
from tuneship.core.model_source import ModelSource
from tuneship.core.recipe import Recipe
from tuneship.serve import choice
from tuneship.serve.choice import Decision

GIB = 2**30
CPU = Hardware((), "", "a processor", 2, 64 * GIB)
HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD, VOCAB = 1536, 8960, 28, 12, 2, 128, 151936


@pytest.fixture
def qwen(tmp_path: Path) -> ModelSource:
    """Qwen2.5-1.5B as far as its headers go: 3.1 GB that take no room on the disk."""
    folder = tmp_path / "qwen"
    folder.mkdir()
    config = {
        "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "vocab_size": VOCAB, "tie_word_embeddings": True,
        "max_position_embeddings": 32768,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    matrices = layer_matrices(HIDDEN, KV_HEADS * HEAD, INNER, HEADS * HEAD)
    shapes = {f"model.layers.{n}.{name}.weight": shape for n in range(LAYERS) for name, shape in matrices.items()}
    shapes["model.embed_tokens.weight"] = (VOCAB, HIDDEN)
    header, at = {}, 0
    for name, (rows, columns) in shapes.items():
        header[name] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [at, at + 2 * rows * columns]}
        at += 2 * rows * columns
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    return ModelSource("org/qwen", "main", folder)


def recipe(**sections: dict[str, Any]) -> Recipe:
    serve = {"mode": "auto", **sections.pop("serve", {})}
    return Recipe.model_validate({"model": {"id": "m"}, "data": {"train": "t"}, "serve": serve, **sections})


def card(gib: float) -> Hardware:
    return Hardware((Gpu("a card", int(gib * GIB), (8, 6)),), "580", "a processor", 8, 32 * GIB)


def decided(source: ModelSource, gib: float, **sections: dict[str, Any]) -> Decision:
    return choice.decide(recipe(**sections), source, card(gib))


def refused(source: ModelSource, machine: Hardware, **sections: dict[str, Any]) -> TuneshipError:
    with pytest.raises(TuneshipError) as caught:
        choice.decide(recipe(**sections), source, machine)
    return caught.value


def test_merged_where_it_fits(qwen: ModelSource):
    found = decided(qwen, 12)
    assert (found.mode, found.quantization) == ("merged", "none")
    assert found.plan.kv_tokens >= found.plan.needed_tokens == 8 * 1024
    assert "fits this machine: 2.9 GiB of weights" in found.reason


def test_the_nf4_base_where_only_that_fits(qwen: ModelSource):
    found = decided(qwen, 6, serve={"max_rank": 16})
    assert (found.mode, found.quantization, found.plan.quantization) == ("adapters", "nf4", "nf4")
    assert "merged, 2.9 GiB of weights leave 0 tokens" in found.reason


@pytest.mark.parametrize("flag", ["--serve.max_rank 16", "--serve.max_loras 1"])
def test_neither_says_what_would_fit(qwen: ModelSource, flag: str):
    error = refused(qwen, card(6))
    assert isinstance(error, PlanError)
    assert "9 adapter slots" in error.message
    assert flag in error.hint
    name, value = flag.removeprefix("--serve.").split()
    assert decided(qwen, 6, serve={name: int(value)}).mode == "adapters", "what is said to fit does not"


@pytest.mark.parametrize("mode", ["auto", "merged"])
def test_a_merge_in_fewer_bits_that_cannot_be_served_is_refused_before_it_is_trained(qwen: ModelSource, mode: str):
    asked: dict[str, Any] = {"serve": {"mode": mode}, "merge": {"quantize": "w4a16"}}
    assert decided(qwen, 12, **asked).mode == "merged"
    without = refused(qwen, Hardware((), "", "a processor", 8, 32 * GIB), **asked)
    assert "SGLang serves on a GPU alone" in without.message
    assert "merge.quantize = 'none'" in without.hint
    config = qwen.path / "config.json"
    narrow = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
    config.write_text(json.dumps(json.loads(config.read_text()) | narrow))
    shapes = {"self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576), "self_attn.v_proj": (192, 576)}
    write_raw(
        {
            f"model.layers.0.{name}.weight": {"dtype": "BF16", "shape": [*shape], "data": bytes(2 * math.prod(shape))}
            for name, shape in shapes.items()
        },
        qwen.path / "model.safetensors",
    )
    narrow_error = refused(qwen, card(12), **asked)
    assert "qkv_proj is 960 x 576" in narrow_error.message
    assert narrow_error.hint == "merge.quantize = 'fp8' or 'none'"


def test_nothing_fits_a_card_that_small(qwen: ModelSource):
    assert "a smaller base" in refused(qwen, card(4)).hint


def test_a_context_that_was_asked_for_has_to_fit(qwen: ModelSource):
    assert decided(qwen, 8).mode == "merged"
    error = refused(qwen, card(6), serve={"max_rank": 16, "context_length": 32768})
    assert "32,768 are wanted" in error.message
    assert "--serve.context_length 0" in error.hint


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        ({"lora": {"target_modules": ["q_proj", "v_proj", "lm_head"]}}, "changes lm_head"),
        ({"lora": {"rank": 128}}, "lora.rank = 128 is over serve.max_rank = 64"),
        (
            {"train": {"method": "lora"}, "quantization": {"method": "none"}, "serve": {"max_rank": 16}},
            "trained on 16-bit weights",
        ),
    ],
    ids=["modules", "rank", "16 bits"],
)
def test_an_adapter_that_cannot_be_served_so_is_merged_or_refused(qwen: ModelSource, sections: dict, why: str):
    assert decided(qwen, 12, **sections).mode == "merged"
    assert why in refused(qwen, card(6), **sections).message


def test_what_a_launch_refuses_is_refused_before_training(qwen: ModelSource):
    nf4 = {"mode": "adapters", "quantization": "nf4", "extra_args": ["--tp", "2"]}
    error = refused(qwen, card(80), serve=nf4)
    assert isinstance(error, PreflightError)
    assert "tensor parallel 2" in error.message
    fp8 = refused(qwen, CPU, serve={"mode": "merged", "quantization": "fp8"})
    assert "needs a GPU" in fp8.message


@pytest.mark.parametrize("serve", [{}, {"mode": "merged"}, {"mode": "adapters", "quantization": "nf4"}], ids=str)
def test_a_card_that_trains_and_cannot_serve(qwen: ModelSource, serve: dict):
    t4 = Hardware((Gpu("Tesla T4", 16 * GIB, (7, 5)),), "580", "a processor", 4, 16 * GIB)
    error = refused(qwen, t4, serve=serve)
    assert isinstance(error, PreflightError)
    assert "Tesla T4 (compute capability 7.5)" in error.message


def test_a_named_mode_is_taken_and_a_plan_may_refuse_it(qwen: ModelSource):
    named = recipe(serve={"mode": "merged"})
    found = choice.decide(named, qwen, card(6))
    assert (found.mode, found.plan.fits) == ("merged", False)
    with pytest.raises(PlanError) as caught:
        choice.require(found, named, qwen, card(6))
    assert "--serve.mode adapters --serve.quantization nf4" not in caught.value.hint, "9 slots of rank 64 do not fit"
    choice.require(choice.decide(named, qwen, card(12)), named, qwen, card(12))


def test_nf4_where_its_values_in_16_bits_fit_is_told_of_them(qwen: ModelSource):
    nf4 = {"mode": "adapters", "quantization": "nf4", "max_rank": 16}
    roomy = decided(qwen, 24, serve=nf4)
    assert "same values in 16 bits would fit too, 2.9 GiB of them, and answer faster" in roomy.reason
    assert (roomy.quantization, roomy.plan.quantization) == ("nf4", "nf4"), "told, not done"
    assert decided(qwen, 6, serve=nf4).reason == "the recipe says so"
    of_16_bits = {"train": {"method": "lora"}, "quantization": {"method": "none"}}
    assert decided(qwen, 24, serve=nf4, **of_16_bits).reason == "the recipe says so"


def test_dequantized_takes_16_bits_and_nf4_is_what_would_fit(qwen: ModelSource):
    asked = {"mode": "adapters", "quantization": "dequantized", "max_rank": 16}
    found = decided(qwen, 24, serve=asked)
    assert (found.quantization, found.plan.quantization) == ("dequantized", "none")
    assert found.plan.weights_bytes == decided(qwen, 24).plan.weights_bytes, "of the merged model"
    small = decided(qwen, 6, serve=asked)
    with pytest.raises(PlanError) as caught:
        choice.require(small, recipe(serve=asked), qwen, card(6))
    assert "--serve.quantization nf4" in caught.value.hint


def test_a_cpu_is_a_machine_too(qwen: ModelSource):
    found = choice.decide(recipe(data={"train": "t", "max_length": 8192}), qwen, CPU)
    assert (found.mode, found.plan.kv_tokens) == ("merged", 20_000)
