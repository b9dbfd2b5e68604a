"""Merging tensor by tensor: the bits of PEFT's merge in memory, or nearer to the exact sum; else refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tuneship.core.errors import ArtifactError
from tuneship.core.recipe import Model, Quantization

torch = pytest.importorskip("torch")

TARGETS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
PLAIN = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
QUIET = "ignore:.*(tied|tie_word_embeddings|save_embedding_layers)"


def load(path: Path, dtype=torch.float32):
    """On the device where merging computes: sums have other last bits on another."""
    from transformers import AutoModelForCausalLM

    from tuneship.train.model import device

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval().to(device())


def write_base(like: Path, out: Path, dtype=torch.float32, *, tied: bool = False, shards: str = "5GB") -> Path:
    """Other weights, and a checkpoint of several shards where `shards` is small."""
    from transformers import AutoConfig, LlamaForCausalLM

    config = AutoConfig.from_pretrained(like)
    config.tie_word_embeddings = tied
    torch.manual_seed(1)
    shutil.copytree(like, out, ignore=shutil.ignore_patterns("*.safetensors"))
    LlamaForCausalLM(config).to(dtype).save_pretrained(out, max_shard_size=shards)
    return out


def train(model, folder: Path, dtype=torch.float32, **config: Any):
    """A PEFT model whose adapter changes something, saved in `folder`."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(**PLAIN | config)).eval()
    torch.manual_seed(2)
    for name, parameter in wrapped.named_parameters():
        if "lora_magnitude" in name or "modules_to_save" in name or "trainable_tokens" in name:
            parameter.data *= 1 + 0.3 * torch.rand_like(parameter)
        elif "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
            parameter.data = parameter.data.to(dtype)
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    return wrapped


def merge(base: Path, adapter: Path, out: Path, tokenizer, *, onto="original", dtype="float32", double=True) -> Path:
    from tuneship.train.merging.merge import Trained, write_merged

    out.mkdir()
    trained = Trained(base, adapter, "nf4", getattr(torch, dtype), double)
    write_merged(trained, onto, tokenizer, (2,), Model(id="tiny", dtype=dtype), out)
    return out


def dequantized(base: Path, dtype: str, *, double: bool = True):
    from tuneship.train.model import load_base

    return load_base(base, Model(id="tiny", dtype=dtype), Quantization(double=double)).dequantize()


def assert_equal(got: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert got.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(got[key].cpu(), tensor.cpu()), key


def logits(model):
    with torch.no_grad():
        return model(torch.arange(3, 40, device=model.device)[None]).logits


WAYS = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3, "0.mlp.up_proj": 5}},
    "the head too": {"target_modules": [*TARGETS, "lm_head"]},
    "a module saved whole": {"modules_to_save": ["lm_head"]},
    "DoRA": {"use_dora": True},
}


@pytest.mark.parametrize("onto", ["original", "dequantized"])
@pytest.mark.parametrize("way", WAYS)
def test_in_float32_it_is_pefts_merge_to_the_bit(tiny_model, tokenizer, tmp_path, monkeypatch, way: str, onto: str):
    from peft import PeftModel

    from tuneship.train.merging import shards

    monkeypatch.setattr(shards, "SHARD_BYTES", 200_000)
    base = write_base(tiny_model, tmp_path / "base", shards="150KB")
    train(load(base), tmp_path / "adapter", **WAYS[way])
    out = merge(base, tmp_path / "adapter", tmp_path / "merged", tokenizer, onto=onto)
    assert len(list(base.glob("*.safetensors"))) > 2
    assert len(list(out.glob("*.safetensors"))) > 2

    under = load(base) if onto == "original" else dequantized(base, "float32")
    wanted = PeftModel.from_pretrained(under, tmp_path / "adapter").merge_and_unload(safe_merge=True)
    assert_equal(load(out).state_dict(), wanted.state_dict())
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2]


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_dequantized_base_is_what_training_computes_with(tiny_model, tokenizer, tmp_path, dtype: str, double: bool):
    """An adapter of zeros: what is merged is the base alone."""
    base = write_base(tiny_model, tmp_path / "base", torch.bfloat16)
    wrapped = train(load(base), tmp_path / "adapter")
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    wrapped.save_pretrained(tmp_path / "adapter")
    args = {"onto": "dequantized", "dtype": dtype, "double": double}
    out = merge(base, tmp_path / "adapter", tmp_path / "merged", tokenizer, **args)
    got, wanted = load(out, getattr(torch, dtype)).state_dict(), dequantized(base, dtype, double=double).state_dict()
    assert_equal(got, wanted)
    original = load(base, getattr(torch, dtype)).state_dict()
    assert sum(not torch.equal(original[key], got[key]) for key in got) == 14, "not the packed layers alone differ"


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_tensor_goes_through_four_bits_in_pieces(monkeypatch, kind: str):
    from bitsandbytes import functional

    from tuneship.train.merging import four_bit
    from tuneship.train.model import device

    monkeypatch.setattr(four_bit, "_PIECE", 256)
    torch.manual_seed(0)
    weight = torch.randn(130, 258, dtype=torch.bfloat16).to(device())  # no multiple of a block
    for double in (True, False):
        packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type=kind)
        wanted = functional.dequantize_4bit(packed, state)
        assert torch.equal(four_bit.there_and_back(weight, kind, double=double), wanted)


def test_a_float32_adapter_is_added_to_a_bfloat16_base_exactly_and_rounded_once(tiny_model, tokenizer, tmp_path):
    """PEFT rounds the product to bfloat16 first, then the sum; the exact sum in float64 is the judge."""
    from peft import PeftModel

    base = write_base(tiny_model, tmp_path / "base", torch.bfloat16)
    trained = train(load(base), tmp_path / "adapter")
    out = merge(base, tmp_path / "adapter", tmp_path / "merged", tokenizer, dtype="bfloat16")
    got = load(out, torch.bfloat16).state_dict()
    peft = PeftModel.from_pretrained(load(base, torch.bfloat16), tmp_path / "adapter").merge_and_unload(safe_merge=True)
    ours, theirs, count = 0, 0, 0
    for module, layer in trained.base_model.model.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
        exact = layer.base_layer.weight.double() + (b @ a) * layer.scaling["default"]
        rounded = exact.bfloat16()
        ours += int((got[f"{module}.weight"] != rounded).sum())
        theirs += int((peft.state_dict()[f"{module}.weight"] != rounded).sum())
        count += rounded.numel()
    assert ours <= count * 1e-4, f"{ours} of {count} values are not the rounded exact sum"
    assert theirs > count * 0.01, "PEFT's merge is as near: this test tells nothing"


TIED = {
    "neither": ({}, True),
    "the head": ({"target_modules": [*TARGETS, "lm_head"]}, False),
    "the embedding": ({"target_modules": [*TARGETS, "embed_tokens"]}, False),
    "both": ({"target_modules": ["embed_tokens", "lm_head"]}, False),
    "the head saved whole": ({"modules_to_save": ["lm_head"]}, False),
}


@pytest.mark.filterwarnings(QUIET)
@pytest.mark.parametrize("what", TIED)
def test_a_head_that_is_the_embedding_becomes_its_own_where_only_one_of_them_was_trained(
    tiny_model, tokenizer, tmp_path, what: str
):
    config, stays = TIED[what]
    base = write_base(tiny_model, tmp_path / "base", tied=True)
    trained = train(load(base), tmp_path / "adapter", **config)
    out = merge(base, tmp_path / "adapter", tmp_path / "merged", tokenizer)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is stays
    merged = load(out)
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) is stays
    torch.testing.assert_close(logits(merged), logits(trained), rtol=0, atol=1e-4)
    assert (logits(load(base)) - logits(trained)).abs().max() > 0.1


REFUSED = {
    "a start that changed the base": ({"init_lora_weights": "pissa"}, "init_lora_weights = pissa"),
    "biases": ({"bias": "all"}, "bias = all"),
    "trained tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    "a bias of lora_B": ({"lora_bias": True, "target_modules": ["q_proj"]}, "lora_bias"),
}


@pytest.mark.filterwarnings("ignore")  # PEFT's, about what is done here on purpose
@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_merged_is_refused_by_name(tiny_model, tokenizer, tmp_path, what: str):
    config, says = REFUSED[what]
    train(load(tiny_model), tmp_path / "adapter", **config)
    with pytest.raises(ArtifactError, match=says) as caught:
        merge(tiny_model, tmp_path / "adapter", tmp_path / "merged", tokenizer)
    assert caught.value.hint
    assert not list((tmp_path / "merged").iterdir())


def test_a_sum_that_is_no_number_is_refused_by_name(tiny_model, tokenizer, tmp_path):
    wrapped = train(load(tiny_model), tmp_path / "adapter")
    wrapped.base_model.model.model.layers[1].mlp.up_proj.lora_B["default"].weight.data[3, 1] = float("nan")
    wrapped.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ArtifactError, match=r"NaN or infinity in model.layers.1.mlp.up_proj.weight"):
        merge(tiny_model, tmp_path / "adapter", tmp_path / "merged", tokenizer)


def test_a_packed_base_has_nothing_to_merge_into(tiny_model, tokenizer, tmp_path):
    from tuneship.train.model import load_base

    load_base(tiny_model, Model(id="tiny"), Quantization()).save_pretrained(tmp_path / "packed")
    train(load(tiny_model), tmp_path / "adapter")
    with pytest.raises(ArtifactError, match="no 16-bit weights"):
        merge(tmp_path / "packed", tmp_path / "adapter", tmp_path / "merged", tokenizer)
