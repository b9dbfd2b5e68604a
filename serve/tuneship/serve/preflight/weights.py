"""An adapter's tensors against the base: every pair whole, in its place, of the right shape and type, and finite.

SGLang finds a tensor's layer by the number in its name, and its module by what the name contains. So it drops what has
no number, takes whatever is no `lora_A` for a `lora_B`, overwrites one of two that look alike to it, and asserts shapes
at the first request, inside the scheduler, where that ends the server.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from tuneship.core import servable
from tuneship.core.quoting import quoted
from tuneship.core.servable import MERGE, PROJECTIONS, REEXPORT, Layer, Reason, unserved_modules
from tuneship.serve import tensors
from tuneship.serve.preflight import settings
from tuneship.serve.preflight.base import BaseModel
from tuneship.serve.tensors import Contents, Tensor

_PREFIX = "base_model.model."
_HALVES = ("lora_A", "lora_B")
_DECODER = re.compile(
    r"(?:(?:model|model\.language_model|language_model\.model|language_model)\.)?layers\.(\d+)\.\w+\.(\w+)"
)
"""A module right below a block of the decoder: (layer, name). Not an expert, not another tower's."""
_RETRAIN = "train it again, or take an earlier checkpoint"


class Weights(NamedTuple):
    """What was found. `layers` are those that it changes, by full name; `silent` says that no pair changes anything."""

    reasons: list[Reason]
    layers: dict[str, Layer]
    silent: bool


class _Pairs(NamedTuple):
    """{module: {half: (key, tensor)}}, and keys that have no place in it."""

    found: dict[str, dict[str, tuple[str, Tensor]]]
    strange: list[str]
    twice: list[str]


def check(
    contents: Contents, config: dict[str, Any], base: BaseModel, served: Collection[str] = PROJECTIONS
) -> Weights:
    """Hold the tensors of a file against the base's matrices and the modules that the server wraps.

    Values that nobody looked at are taken for good.
    """
    headers, values = contents.headers, contents.values
    pairs = _sort(headers)
    here = {module: halves for module, halves in pairs.found.items() if module in base.linear}
    reasons = [
        *_names(pairs, base),
        *_modules(here, served),
        *_coverage(pairs, config, base),
        *_shapes(here, config, base),
        *_types(headers),
        *_numbers(key for key, value in values.items() if not value.finite),
    ]
    changing = [
        module
        for module, halves in here.items()
        if not any(values[key].zero for key, _ in halves.values() if key in values)
    ]
    return Weights(reasons, servable.layers(config, here), not changing)


def _sort(headers: dict[str, Tensor]) -> _Pairs:
    pairs = _Pairs(defaultdict(dict), [], [])
    for key, tensor in headers.items():
        module, _, half = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        if half not in _HALVES or not key.endswith(".weight"):
            pairs.strange.append(key)
        elif half in pairs.found[module]:
            pairs.twice.append(key)
        else:
            pairs.found[module][half] = (key, tensor)
    return pairs


def _names(pairs: _Pairs, base: BaseModel) -> list[Reason]:
    """Tensors that are no half of a pair, that are there twice, or whose module the base does not have."""
    reasons = []
    if not pairs.found and not pairs.strange:
        reasons.append(Reason("has no tensors at all", REEXPORT))
    if pairs.strange:
        unfinished = all(re.search(r"\.lora_[AB]\.\w+\.weight$", key) for key in pairs.strange)
        fact = f"has tensors that are no lora_A or lora_B, which SGLang drops or misreads: {_some(pairs.strange)}"
        reasons.append(Reason(fact, REEXPORT if unfinished else MERGE))
    if pairs.twice:
        reasons.append(Reason(f"has tensors twice, with and without {_PREFIX!r}: {_some(pairs.twice)}", REEXPORT))
    unknown = [next(iter(halves.values()))[0] for module, halves in pairs.found.items() if module not in base.linear]
    if unknown:
        fact = f"does not fit: {base.record.id} has nothing for {_some(unknown)}"
        reasons.append(Reason(fact, "serve it on the base that it was trained on"))
    return reasons


def _modules(here: Iterable[str], served: Collection[str]) -> list[Reason]:
    """Layer by layer, what the server wraps; a place in the decoder can be taken once."""
    layers: dict[str, list[str]] = defaultdict(list)
    outside: dict[str, list[str]] = defaultdict(list)
    for module in here:
        match = _DECODER.fullmatch(module)
        if match:
            layers[match.group(1)].append(match.group(2))
        else:
            outside[module.rpartition(".")[2]].append(module)
    reasons = {reason: None for names in layers.values() for reason in unserved_modules(names, served)}
    for name, modules in outside.items():
        if name in served:
            fact = f"changes {_some(modules)}: the server wraps {name} only right below a decoder's block"
            reasons[Reason(fact)] = None
        else:
            reasons |= dict.fromkeys(unserved_modules([name], served))
    alike = sorted({name for names in layers.values() for name in names if names.count(name) > 1})
    if alike:
        reasons[Reason(f"changes several {', '.join(alike)} in one layer, which SGLang takes for one")] = None
    return list(reasons)


def _coverage(pairs: _Pairs, config: dict[str, Any], base: BaseModel) -> list[Reason]:
    """Both halves of every pair, and a pair for every layer that the settings name, and for no other."""
    cut = [f"{half} of {module}" for module, halves in pairs.found.items() for half in _HALVES if half not in halves]
    reasons = [Reason(f"is not whole: it lacks {_some(cut)}", REEXPORT)] if cut else []
    decoder = {module: match for module in base.linear if (match := _DECODER.fullmatch(module))}
    wanted = settings.chosen(config, decoder)
    extra = decoder.keys() & pairs.found.keys() - wanted
    if extra:
        fact = f"has tensors that its settings leave out, which PEFT ignores and SGLang adds: {_some(extra)}"
        reasons.append(Reason(fact, REEXPORT))
    missing: dict[str, set[int]] = defaultdict(set)
    for module in wanted - pairs.found.keys():
        missing[decoder[module].group(2)].add(int(decoder[module].group(1)))
    for name, layers in sorted(missing.items()):
        whole = sum(decoder[module].group(2) == name for module in wanted)
        numbers = ", ".join(map(str, sorted(layers)[:8])) + (", ..." if len(layers) > 8 else "")
        fact = f"is not whole: {name} has no tensors in {len(layers)} of {whole} layers ({numbers})"
        reasons.append(Reason(fact, f"{REEXPORT}; what it does not change belongs out of target_modules"))
    return reasons


def _shapes(here: dict[str, dict[str, tuple[str, Tensor]]], config: dict[str, Any], base: BaseModel) -> list[Reason]:
    """A must be (rank, in) and B (out, rank) of a weight (out, in)."""
    wrong = []
    for module, (rank, _) in servable.layers(config, here).items():
        halves = here[module]
        rows, columns = base.linear[module]
        for half, wanted in (("lora_A", (rank, columns)), ("lora_B", (rows, rank))):
            key, tensor = halves.get(half, ("", None))
            if tensor and tensor.shape != wanted:
                wrong.append(f"{key} is {tensor.shape}, the base and rank {rank} want {wanted}")
    if not wrong:
        return []
    named = config.get("base_model_name_or_path")
    named = quoted(named) if isinstance(named, str) and named else ""
    trained_on = f"the base that it was trained on ({named})" if named else "the base that it was trained on"
    return [Reason(f"does not fit {base.record.id}: {_some(wrong, 1)}", f"serve it on {trained_on}")]


def _types(headers: dict[str, Tensor]) -> list[Reason]:
    odd = [f"{key} ({tensor.dtype})" for key, tensor in headers.items() if tensor.dtype not in tensors.FLOATS]
    if not odd:
        return []
    return [Reason(f"has tensors that are not {', '.join(tensors.FLOATS)}: {_some(odd)}", f"{REEXPORT}, in bfloat16")]


def _numbers(bad: Iterable[str]) -> list[Reason]:
    names = list(bad)
    return [Reason(f"has NaN or infinity in {_some(names)}", _RETRAIN)] if names else []


def _some(names: Collection[str], most: int = 2) -> str:
    first = ", ".join(sorted(names)[:most])
    return first if len(names) <= most else f"{first} and {len(names) - most} more"
