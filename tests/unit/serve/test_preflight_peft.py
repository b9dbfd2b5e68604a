"""Adapters as PEFT itself writes them, and the settings of other trainers: what is served, what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuneship.core import servable
from tuneship.core.errors import PreflightError
from tuneship.core.model_source import ModelSource
from tuneship.serve import preflight
from tuneship.serve.preflight import settings as adapter_settings
from tuneship.serve.preflight.base import BaseModel

DEFAULTS = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:k_proj|v_proj|q_proj|out_proj|o_proj|gate_proj|up_proj|down_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
    r"(?:(?:k_proj|v_proj|q_proj|out_proj|o_proj|gate_proj|up_proj|down_proj)))"
)

Train = Callable[..., Path]


@pytest.fixture(scope="module")
def facts(tiny_model: Path) -> BaseModel:
    return preflight.read_base(ModelSource(str(tiny_model), "", tiny_model))


@pytest.fixture
def save(tiny_model: Path, tmp_path: Path) -> Train:
    """(LoraConfig's arguments, edits of the file) -> what PEFT saves of an untrained, random adapter."""

    def make(edit: dict[str, Any] | None = None, **config: Any) -> Path:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(**(DEFAULTS | config)))
        model.save_pretrained(tmp_path / "sql")
        file = tmp_path / "sql" / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | (edit or {})))
        return tmp_path / "sql"

    return make


def test_every_field_of_peft_was_thought_of():
    from peft import LoraConfig

    assert {field.name for field in dataclasses.fields(LoraConfig)} - servable.KNOWN == set()


SERVED = {
    "its defaults": {},
    "all seven, by name": {"target_modules": [*servable.PROJECTIONS]},
    "all-linear": {"target_modules": "all-linear"},
    "a pattern": {"target_modules": r".*\.layers\.\d+\.mlp\.(gate|up|down)_proj"},
    "Unsloth's pattern": {"target_modules": UNSLOTH},
    "one layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "all but": {"target_modules": [*servable.PROJECTIONS], "exclude_modules": r".*0\.self_attn.*"},
    "rsLoRA": {"use_rslora": True},
    "a start of its own": {"init_lora_weights": "orthogonal"},
    "training alone": {"lora_dropout": 0.1, "task_type": "CAUSAL_LM", "inference_mode": True},
    "several ranks": {"rank_pattern": {"q_proj": 2}},
    "several alphas": {"alpha_pattern": {"q_proj": 2, "v_proj": 3}},
    "a pattern that says nothing new": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 8}},
}


@pytest.mark.parametrize("config", SERVED.values(), ids=SERVED.keys())
def test_what_is_served(save, facts, config: dict):
    path = save(**config)
    found = preflight.check(path, facts)
    folded = servable.needs_folding(json.loads((path / "adapter_config.json").read_text()))
    assert (found.path == path.resolve()) is not folded
    assert found.remarks == ()
    assert preflight.check(path, facts) == found, "checking it again made another copy"


@pytest.mark.parametrize("name", ["several ranks", "several alphas"])
def test_a_folded_copy_gives_the_logits_of_the_original(save, facts, tiny_model: Path, name: str):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def logits(folder: Path | None):
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        with torch.no_grad():
            return (
                (PeftModel.from_pretrained(model, folder) if folder else model).eval()(torch.arange(3, 40)[None]).logits
            )

    path = save(**SERVED[name])
    wanted = logits(path)
    torch.testing.assert_close(logits(preflight.check(path, facts).path), wanted, rtol=0, atol=1e-5)
    assert (logits(None) - wanted).abs().max() > 1e-3, "the adapter changes nothing"


REFUSED = {
    "DoRA": ({"use_dora": True}, ["use_dora", "lora_magnitude_vector"]),
    "a module saved whole": ({"modules_to_save": ["lm_head"]}, ["modules_to_save", "lm_head"]),
    "biases": ({"bias": "all"}, ["bias"]),
    "a bias of lora_B": ({"lora_bias": True}, ["lora_bias", "lora_B.bias"]),
    "the embedding": ({"target_modules": ["q_proj", "v_proj", "embed_tokens"]}, ["embed_tokens"]),
    "the head": ({"target_modules": ["q_proj", "v_proj", "lm_head"]}, ["changes lm_head"]),
    "trained tokens": ({"trainable_token_indices": [1, 2]}, ["trainable_token_indices"]),
    "PiSSA": ({"init_lora_weights": "pissa"}, ["init_lora_weights = pissa"]),
    "OLoRA": ({"init_lora_weights": "olora"}, ["init_lora_weights = olora"]),
    "aLoRA": ({"alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"}, ["alora_invocation_tokens"]),
    "a layer used twice": ({"layer_replication": [[0, 2], [1, 2]]}, ["layer_replication", "layers.2."]),
    "q alone": ({"target_modules": ["q_proj"]}, ["changes q_proj without v_proj"]),
    "too large a rank": ({"r": 65}, ["has rank 65, the server takes at most 64"]),
    "too large a rank in one place": ({"rank_pattern": {"q_proj": 65}}, ["has rank 65, the server takes at most 64"]),
}


@pytest.mark.filterwarnings("ignore")  # PEFT's, about what is done here on purpose
@pytest.mark.parametrize(("config", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused(save, facts, config: dict, says: list[str]):
    path = save(**config)
    with pytest.raises(PreflightError) as caught:
        preflight.check(path, facts)
    for words in says:
        assert words in caught.value.message
    assert caught.value.hint


@pytest.mark.filterwarnings("ignore")
def test_pissa_saved_as_plain_lora_is_served(tiny_model, facts, tmp_path: Path):
    """What the hint says to do."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(**DEFAULTS | {"init_lora_weights": "pissa"})
    )
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    model.save_pretrained(tmp_path / "sql", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert preflight.check(tmp_path / "sql", facts).path == (tmp_path / "sql").resolve()


OTHERS = {
    "Unsloth": {
        "auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "unsloth", "unsloth_fixed": True},
        "base_model_name_or_path": "unsloth/tiny-llama-bnb-4bit",
        "lora_bias": False,
        "modules_to_save": None,
        "peft_version": "0.18.0",
        "target_modules": UNSLOTH,
        "task_type": "CAUSAL_LM",
        "use_rslora": True,
        "loftq_config": {},
        "qalora_group_size": 16,
    },
    "Axolotl": {
        "base_model_name_or_path": "/workspace/models/tiny",
        "fan_in_fan_out": None,
        "inference_mode": True,
        "layers_to_transform": None,
        "lora_dropout": 0.05,
        "megatron_core": "megatron.core",
        "peft_version": "0.15.2",
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": None,
        "corda_config": None,
    },
    "PEFT 0.3": {
        "enable_lora": None,
        "merge_weights": False,
        "fan_in_fan_out": False,
        "bias": "none",
        "modules_to_save": None,
        "task_type": "CAUSAL_LM",
    },
}


@pytest.mark.parametrize("trainer", OTHERS)
def test_settings_of_other_trainers(save, facts, trainer: str):
    found = preflight.check(save(OTHERS[trainer], target_modules=[*servable.PROJECTIONS]), facts)
    config = json.loads((found.path / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == sorted(servable.PROJECTIONS)
    assert config["lora_alpha"] / config["r"] == (8 / 2 if trainer == "Unsloth" else 8 / 4)


MODULES = [
    *(
        f"model.layers.{n}.{block}.{name}"
        for n in (0, 1, 11)
        for block, name in [("self_attn", "q_proj"), ("mlp", "up_proj")]
    ),
    "lm_head",
    "q_proj",
]
NAMES = st.sampled_from(
    ["q_proj", "proj", "up_proj", "lm_head", "self_attn.q_proj", "model.layers.1.mlp.up_proj", "1.mlp.up_proj", "mlp"]
)
PATTERNS = st.sampled_from([r".*q_proj", r".*\.(0|1)\..*", r"lm_head", "q_proj", ".*"])


@settings(max_examples=300, deadline=None)
@given(
    targets=st.lists(NAMES, max_size=3) | PATTERNS,
    excluded=st.none() | st.lists(NAMES, max_size=2) | PATTERNS,
    layers=st.none() | st.integers(0, 2) | st.lists(st.sampled_from([0, 1, 11]), max_size=2),
    pattern=st.none() | st.sampled_from(["layers", ["h", "layers"]]),
)
def test_modules_are_chosen_as_peft_chooses_them(targets, excluded, layers, pattern):
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    if isinstance(targets, str):
        layers = pattern = None  # PEFT takes them with a list only
    if layers is None:
        pattern = None
    config = {"target_modules": targets, "exclude_modules": excluded}
    config |= {"layers_to_transform": layers, "layers_pattern": pattern}
    theirs = LoraConfig(**config)
    wanted = {module for module in MODULES if bool(check_target_module_exists(theirs, module))}
    assert adapter_settings.chosen(config, MODULES) == wanted
