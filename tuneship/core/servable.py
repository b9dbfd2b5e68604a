"""Which LoRA adapters can be served as adapters: what SGLang makes of PEFT's settings, as data.

    unserved(config)                          # of an adapter_config.json, or of what training is about to write
    unserved_modules(["q_proj", "lm_head"])   # of a recipe, or of one layer of an adapter's tensors
    fold(config, layers(config, modules))     # the same adapter in the words that SGLang understands

SGLang reads `r`, `lora_alpha`, `target_modules` and `use_dora`, and ignores everything else without a word (0.5.17 and
0.5.23). So each field of PEFT's `LoraConfig` (0.21) stands in exactly one of three tables here: it says nothing about
the answer, or it must be unset or at a value that SGLang assumes, or it can be folded into what SGLang reads. A field
that is in none of them comes from a newer PEFT: it is refused unless it is unset (null, false, "", [] or {}), because
PEFT switches a new feature on with a value and off without one.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from tuneship.core.quoting import on_one_line

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a decoder block that our servers wrap with LoRA."""
FUSED = {"qkv_proj": PROJECTIONS[:3], "gate_up_proj": PROJECTIONS[4:6]}
"""{layer of a model that keeps them in one: what it holds}. SGLang fuses them so in every model."""

MERGE = "merge it (`tuneship merge`, or PEFT's merge_and_unload on the 16-bit base) and serve the merged model"
REEXPORT = "save it again with PEFT's save_pretrained"

# SGLang stacks q, k, v and gate, up. A missing k or up it fills with zeros; without the others it fails, or dies later.
_PARTNERS = {"q_proj": ("v_proj",), "k_proj": ("q_proj", "v_proj"), "v_proj": ("q_proj",), "up_proj": ("gate_proj",)}


class Reason(NamedTuple):
    """Why an adapter cannot be served: a `fact` that goes on from "the adapter ...", and what to do about it."""

    fact: str
    fix: str = MERGE


class Layer(NamedTuple):
    """One module's LoRA: `scaling` is what PEFT multiplies B A with."""

    rank: int
    scaling: float


class Folding(NamedTuple):
    """An adapter with one rank and one alpha / r: its settings, and what becomes of its tensors."""

    config: dict[str, Any]
    factors: dict[str, float]
    """{module: what its lora_B is multiplied with}. All A and B are padded with zeros to the rank in `config`."""

    @property
    def rank(self) -> int:
        """Of every module."""
        return int(self.config["r"])


class _Held(NamedTuple):
    """A field that must be unset or one of `allowed`."""

    why: str
    allowed: tuple[Any, ...] = ()
    fix: str = MERGE


_PLAIN = (
    "save it as plain LoRA: save_pretrained(..., path_initial_model_for_weight_conversion=...) of PEFT, "
    "or serve it on the base that its training changed"
)
_SILENT = frozenset({
    # Where it comes from. The base's name is a hint only: copies of a model have many names, the weights decide.
    *("auto_mapping", "base_model_name_or_path", "peft_version", "revision"),
    # Training and runtime alone.
    *("inference_mode", "lora_dropout", "runtime_config", "megatron_core", "ensure_weight_tying"),
    # Read by PEFT only under the `init_lora_weights` or `use_qalora` that they belong to, which are held.
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config", "qalora_group_size"),
    # Which modules it changes: the tensors say so themselves, and serve holds them against these.
    *("exclude_modules", "layers_pattern", "layers_to_transform"),
})  # fmt: skip
_PATTERNS = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}
_FOLDED = frozenset({"r", "lora_alpha", "use_rslora", "target_modules", *_PATTERNS})
_HELD = {
    "peft_type": _Held("SGLang serves LoRA and nothing else", ("LORA",)),
    "task_type": _Held("the server generates text", ("CAUSAL_LM",)),
    "bias": _Held("SGLang drops the biases that were trained", ("none",)),
    "fan_in_fan_out": _Held("SGLang takes weights as (out, in)"),
    "init_lora_weights": _Held(
        "that start changes the base's weights", (True, "gaussian", "orthogonal", "eva", "mica"), _PLAIN
    ),
    "modules_to_save": _Held("SGLang drops the modules that were saved whole"),
    "trainable_token_indices": _Held("SGLang drops the tokens that were trained"),
    "use_dora": _Held("SGLang has no DoRA"),
    "use_qalora": _Held("SGLang pools no inputs (QA-LoRA)"),
    "use_bdlora": _Held("SGLang takes the blocks of block-diagonal LoRA for whole matrices"),
    "lora_bias": _Held("SGLang drops the bias of lora_B"),
    "target_parameters": _Held("SGLang wraps modules, not parameters"),
    "layer_replication": _Held("the server has each of the base's layers once"),
    # It cannot be merged either.
    "alora_invocation_tokens": _Held(
        "SGLang applies it to every token, not from those on (aLoRA)", (), "train it again without aLoRA"
    ),
    "arrow_config": _Held("SGLang routes between no adapters (Arrow)", (), "serve the adapters that it routes to"),
    "kasa_config": _Held("SGLang has no singular values between A and B (KaSA)"),
    "monteclora_config": _Held("SGLang samples no weights (MonteCLoRA)"),
    "velora_config": _Held("SGLang has not been tried with VeLoRA"),
    "megatron_config": _Held("it was trained in Megatron's layers, not in those of the base"),
}
_MERGED = frozenset({"task_type", "modules_to_save", "use_dora"})
"""What `tuneship merge` merges right, of what is held."""
KNOWN = _SILENT | _FOLDED | _HELD.keys()
"""Every field of a `LoraConfig` that this list was made for."""


def unserved(config: Mapping[str, Any]) -> list[Reason]:
    """What keeps an adapter with these settings (PEFT's names) from being served; empty when nothing does.

    Fields that are missing are at PEFT's defaults. Which modules it changes is `unserved_modules`'s question.
    """
    return [reason for _, reason in _refused(config)]


def unmerged(config: Mapping[str, Any]) -> list[Reason]:
    """What keeps an adapter with these settings from being merged by `tuneship merge`; empty when nothing does."""
    reasons = [(key, reason) for key, reason in _refused(config) if key not in _MERGED]
    by_peft = "merge it with PEFT's merge_and_unload on the 16-bit base, or train it again without"
    return [reason._replace(fix=f"{by_peft} {key}") if reason.fix == MERGE else reason for key, reason in reasons]


def unserved_modules(names: Iterable[str], served: Iterable[str] = PROJECTIONS) -> list[Reason]:
    """What keeps an adapter that changes these modules of a decoder layer from being served beside the base."""
    names, served = set(names), tuple(served)
    foreign = sorted(names - set(served) - {fused for fused, parts in FUSED.items() if {*parts} <= {*served}})
    reasons = [Reason(f"changes {', '.join(foreign)}; the server wraps {', '.join(served)}")] if foreign else []
    for name in sorted(names):
        missing = [partner for partner in _PARTNERS.get(name, ()) if partner not in names]
        if missing:
            reasons.append(
                Reason(f"changes {name} without {' and '.join(missing)}, with which SGLang stacks it into one layer")
            )
    return reasons


def scaling(config: Mapping[str, Any]) -> float:
    """What PEFT multiplies B A with where no pattern says otherwise."""
    return _scaling(config, config["r"], config["lora_alpha"])


def layers(config: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Layer]:
    """What PEFT makes of each of `modules` (full names) under `config`: of patterns the first that fits its end."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    found = {}
    for module in modules:
        rank = _by_pattern(ranks, module, config["r"])
        found[module] = Layer(rank, _scaling(config, rank, _by_pattern(alphas, module, config["lora_alpha"])))
    return found


def fold(config: Mapping[str, Any], layers: Mapping[str, Layer]) -> Folding:
    """How SGLang, which has one rank and scales by alpha / r, does what PEFT does under `config` in `layers`.

    The names of the layers replace a pattern of targets. rsLoRA's alpha / sqrt(r) becomes part of alpha, which is
    PEFT's scaling to within a float64's rounding. Where ranks or scalings differ, the largest rank and the commonest
    scaling become everybody's, and what a layer's scaling differs by becomes part of its lora_B.
    """
    plain = {**config, "target_modules": sorted({name.rpartition(".")[2] for name in layers})}
    common = _commonest(layer.scaling for layer in layers.values())
    if config.get("use_rslora") or _has_patterns(config):
        rank = max(layer.rank for layer in layers.values())
        plain |= {"r": rank, "lora_alpha": common * rank, "use_rslora": False}
        plain |= {key: {} for key in _PATTERNS if config.get(key)}
    return Folding(plain, {name: layer.scaling / common if common else 1.0 for name, layer in layers.items()})


def needs_folding(config: Mapping[str, Any], served: Iterable[str] = PROJECTIONS) -> bool:
    """Whether SGLang would refuse or misread `config`, and `fold` mends it."""
    targets = config["target_modules"]
    if config.get("use_rslora") or _has_patterns(config) or isinstance(targets, str):
        return True
    return not {target.rpartition(".")[2] for target in targets} <= {*served, *FUSED}


def _refused(config: Mapping[str, Any]) -> list[tuple[str, Reason]]:
    """(field, why it is refused)."""
    found = []
    for key, value in sorted(config.items()):
        if _is_unset(value) or key in _SILENT | _FOLDED:
            continue
        held = _HELD.get(key)
        if held is None:
            fact = f"sets {on_one_line(key)} = {_short(value)}, which this tuneship does not know"
            fix = f"upgrade tuneship; if {on_one_line(key)} changes no answer, set it to null in adapter_config.json"
            found.append((key, Reason(fact, fix)))
        elif not any(value is allowed or value == allowed for allowed in held.allowed):
            found.append((key, Reason(f"sets {key} = {_short(value)}: {held.why}", held.fix)))
    return found


def _scaling(config: Mapping[str, Any], rank: int, alpha: float) -> float:
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _by_pattern(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)


def _has_patterns(config: Mapping[str, Any]) -> bool:
    """Whether a pattern says anything else than what holds for all modules anyway."""
    return any(
        value != config[common] for key, common in _PATTERNS.items() for value in (config.get(key) or {}).values()
    )


def _commonest(scalings: Iterable[float]) -> float:
    """Of several that are equally common, the largest; never 0 beside others, which no multiple of it could be."""
    counted = Counter(scaling for scaling in scalings if scaling)
    return max(counted, key=lambda scaling: (counted[scaling], scaling), default=0.0)


def _is_unset(value: Any) -> bool:
    """Null, false, or empty; a zero is a value."""
    return value is None or value is False or (isinstance(value, str | list | tuple | dict) and not value)


def _short(value: Any) -> str:
    text = str(value)
    return on_one_line(text if len(text) <= 60 else f"{text[:57]}...")
