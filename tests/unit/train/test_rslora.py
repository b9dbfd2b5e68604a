"""rsLoRA: trained with alpha / sqrt(rank), exported as plain LoRA that gives the same logits."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tuneship.core import servable
from tuneship.core.recipe import Lora

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("rank", [8, 12])
def test_the_exported_adapter_gives_the_logits_of_the_trained_one(tiny_model: Path, tmp_path: Path, rank: int):
    from peft import PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    from tuneship.train.model import lora_config, save_adapter

    def base():
        return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)

    untrained = base()
    trained = get_peft_model(untrained, lora_config(Lora(rank=rank, alpha=5, rslora=True), untrained)).eval()
    torch.manual_seed(0)
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:  # it starts at zero
            torch.nn.init.normal_(parameter, std=0.1)
    config = save_adapter(trained, tmp_path)
    assert config == json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["use_rslora"] is False
    assert servable.scaling(config) == pytest.approx(5 / math.sqrt(rank), rel=1e-15)
    assert not servable.needs_folding(config), "a server would have to make a copy of it"

    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        wanted = trained(ids).logits
        got = PeftModel.from_pretrained(base(), tmp_path).eval()(ids).logits
        plain = base()(ids).logits
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    assert (plain - wanted).abs().max() > 0.1, "the adapter changes nothing"


def test_plain_lora_is_written_as_peft_writes_it(tiny_model: Path, tmp_path: Path):
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from tuneship.train.model import lora_config, save_adapter

    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    trained = get_peft_model(base, lora_config(Lora(rank=4, alpha=8), base))
    trained.save_pretrained(tmp_path / "peft")
    save_adapter(trained, tmp_path / "ours")
    ours, peft = (tmp_path / name / "adapter_config.json" for name in ("ours", "peft"))
    assert ours.read_bytes() == peft.read_bytes()
