"""Which base is merged into: measured where it fits, the original and no figures where it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tuneship.core.recipe import Recipe

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory):
    """(Trained, reference): an adapter on the NF4 base, which says something else than its base."""
    from peft import LoraConfig, get_peft_model

    from tuneship.train import parity
    from tuneship.train.data.template import IGNORED, Encoded
    from tuneship.train.merging.merge import Trained
    from tuneship.train.model import load_base

    folder = tmp_path_factory.mktemp("adapter")
    base = load_base(tiny_model, recipe(tiny_model).model, recipe(tiny_model).quantization)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    rows = [Encoded(list(range(n, n + 12)), [IGNORED] * 2 + list(range(n + 2, n + 12))) for n in range(5, 45, 5)]
    reference = parity.measure_reference(model, rows, pad_id=0, dtype="float32")
    return Trained(tiny_model, folder, "nf4", torch.float32, double=True), reference


def recipe(model: Path, **merge: Any) -> Recipe:
    tree = {"model": {"id": str(model), "dtype": "float32"}, "data": {"train": "a.jsonl"}, "merge": merge}
    return Recipe.model_validate(tree)


def make(trained, tokenizer, out: Path, *, with_reference: bool = True, **merge: Any):
    from tuneship.train.merging import candidates

    what, reference = trained
    text = candidates.Text(tokenizer, (2,), 0)
    kept = candidates.make(recipe(what.base, **merge), what, what.base, text, reference if with_reference else [], out)
    assert {file.name for file in out.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert all(file.is_file() for file in out.iterdir()), "a candidate was left there"
    return kept


def test_auto_keeps_what_is_better_on_held_out_rows_and_records_both(trained, tokenizer, tmp_path):
    kept = make(trained, tokenizer, tmp_path)
    assert kept.nlls.keys() == {"original", "dequantized"}
    assert kept.nlls[kept.onto] == min(kept.nlls.values())
    verdict = kept.judge("a", 8, limit=10)
    assert (verdict.merged_into, verdict.candidates) == (kept.onto, kept.nlls)
    assert verdict.nll == kept.nlls[kept.onto]
    # In float32 it is the trained model, up to the bfloat16 in which bitsandbytes may multiply on a CPU.
    assert kept.measured["dequantized"].kl_mean < kept.measured["original"].kl_mean / 20


def test_the_one_that_was_kept_is_the_one_that_lies_there(trained, tokenizer, tmp_path):
    from safetensors.torch import load_file

    folders = [tmp_path / name for name in ("auto", "original", "dequantized")]
    for folder in folders:
        folder.mkdir()
    kept = make(trained, tokenizer, folders[0])
    for base in ("original", "dequantized"):
        assert make(trained, tokenizer, tmp_path / base, base=base).nlls.keys() == {base}
    auto, original, dequantized = (load_file(folder / "model.safetensors") for folder in folders)
    key = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(auto[key], original[key]) is (kept.onto == "original")
    assert torch.equal(auto[key], dequantized[key]) is (kept.onto == "dequantized")


@pytest.mark.parametrize(("base", "onto"), [("auto", "original"), ("dequantized", "dequantized")])
def test_what_does_not_fit_is_written_and_its_parity_deferred(trained, tokenizer, tmp_path, monkeypatch, base, onto):
    from tuneship.train.merging import candidates

    monkeypatch.setattr(candidates, "_USABLE", 0)
    kept = make(trained, tokenizer, tmp_path, base=base)
    assert (kept.onto, kept.measured) == (onto, {})
    assert "GiB side by side" in kept.deferred


def test_without_held_out_rows_nothing_is_measured_and_nothing_deferred(trained, tokenizer, tmp_path):
    kept = make(trained, tokenizer, tmp_path, with_reference=False)
    assert (kept.onto, kept.measured, kept.deferred) == ("original", {}, "")
