"""Merged, or as an adapter on its base? What a recipe's run will serve, decided before hours of training.

    decision = decide(recipe, source, hardware.detect())     # raises what a launch would
    decision.mode, decision.quantization, decision.reason
    require(decision, recipe, source, hardware.detect())     # raises with what would fit

The rule of `serve.mode = "auto"`: merged where the 16-bit weights and a usable KV cache fit this machine; else the
adapter on the NF4 base that it was trained on, if that fits; else an error that says what would. A KV cache is usable
when it holds `USABLE_STREAMS` streams of the longest row that training takes (data.max_length), and one of
serve.context_length where the recipe gives one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

from tuneship.core import base_store
from tuneship.core.errors import ArtifactError, PlanError, PreflightError
from tuneship.core.hardware import Hardware, gib
from tuneship.core.model_source import ModelSource
from tuneship.core.recipe import Recipe, Serve
from tuneship.core.servable import PROJECTIONS, unserved_modules
from tuneship.serve import footprint, packed, plan, quantized, startable
from tuneship.serve.footprint import Format
from tuneship.serve.plan import Mode, ServingPlan
from tuneship.serve.preflight.base import linear

USABLE_STREAMS = 8
_FORMATS: Mapping[str, Format] = {"none": "none", "nf4": "nf4", "dequantized": "none", "fp8": "fp8", "w4a16": "none"}
"""By what a recipe asks for, how the weights lie in memory."""


class Decision(NamedTuple):
    """What a recipe's run will serve, and why."""

    mode: Mode
    quantization: Literal["none", "nf4", "dequantized", "fp8", "w4a16"]
    reason: str
    plan: ServingPlan


def decide(recipe: Recipe, source: ModelSource, machine: Hardware) -> Decision:
    """How `recipe`, whose base lies at `source`, is served on `machine`.

    A mode that the recipe names is taken, whether it fits or not: `require` is for those who want to know.

    Raises:
        PreflightError: SGLang cannot serve it so, however much memory there is.
        PlanError: `auto` fits in neither way, or the memory of this architecture or machine cannot be planned.

    """
    serve = recipe.serve
    startable.require(serve, machine)
    if serve.mode != "auto":
        refuse_what_cannot_start(recipe, source, machine)
        reason = f"the recipe says so{_faster(recipe, source, machine)}"
        return Decision(serve.mode, serve.quantization, reason, _plan(recipe, source, machine, serve))
    merged_serve = serve.model_copy(update={"mode": "merged"})
    merged = _plan(recipe, source, machine, merged_serve)
    if merged.fits:
        refuse_what_cannot_start(recipe.model_copy(update={"serve": merged_serve}), source, machine)
        left = f"{gib(merged.weights_bytes)} of weights leave {merged.kv_tokens:,} tokens of KV cache"
        return Decision("merged", "none", f"it fits this machine: {left}, {merged.needed_tokens:,} are wanted", merged)
    adapters_serve = serve.model_copy(update={"mode": "adapters", "quantization": "nf4"})
    why_not = [*_not_as_adapter(recipe), *_not_on_nf4(recipe)]
    adapters = _plan(recipe, source, machine, adapters_serve)
    if why_not or not adapters.fits:
        raise _neither(recipe, source, machine, merged, adapters_serve, why_not)
    refuse_what_cannot_start(recipe.model_copy(update={"serve": adapters_serve}), source, machine)
    short = f"merged, {gib(merged.weights_bytes)} of weights leave {merged.kv_tokens:,} tokens of KV cache"
    reason = f"{short} where {merged.needed_tokens:,} are wanted; on the NF4 base there are {adapters.kv_tokens:,}"
    return Decision("adapters", "nf4", reason, adapters)


def refuse_what_cannot_start(recipe: Recipe, source: ModelSource, machine: Hardware) -> None:
    """Raise the PreflightError that launching the recipe's server would end with."""
    serve = recipe.serve
    if serve.mode == "merged":  # made of the original's 16 bits, whatever it was trained on
        stored = "none"
        _refuse_merge_in_fewer_bits(recipe, source, machine)
    elif serve.quantization == "nf4":  # it will be, if it is not yet
        stored = "nf4"
    elif serve.quantization == "dequantized":
        quantized.to_find(str(source.path), serve)
        stored = "none"
    else:
        quantized.with_quantization(str(source.path), serve)
        stored = quantized.weights(source.path).method
    quantized.method(serve, stored, machine)


def _refuse_merge_in_fewer_bits(recipe: Recipe, source: ModelSource, machine: Hardware) -> None:
    """Raise a PreflightError where SGLang cannot serve here what `merge.quantize` would make."""
    made = recipe.merge.quantize
    if made != "none" and not machine.gpus:
        raise PreflightError(
            f"merge.quantize = {made!r} makes weights that SGLang serves on a GPU alone",
            hint="merge.quantize = 'none'; or --until merge --serve.mode merged, and serve it on a GPU",
        )
    if made == "w4a16" and quantized.tensor_parallel(recipe.serve.extra_args) == "1":
        packed.require(linear(source.path), hint="merge.quantize = 'fp8' or 'none'")


def require(decision: Decision, recipe: Recipe, source: ModelSource, machine: Hardware) -> None:
    """Raise PlanError, with what would fit, unless the decided server has a usable KV cache."""
    if not decision.plan.fits:
        serve = recipe.serve.model_copy(update={"mode": decision.mode, "quantization": decision.quantization})
        raise PlanError(_short(decision.plan), hint=_hint(recipe, source, machine, serve))


def _plan(recipe: Recipe, source: ModelSource, machine: Hardware, serve: Serve) -> ServingPlan:
    """The server of `recipe` with `serve` in the place of its own settings."""
    merged = serve.mode == "merged"
    of_16_bits = merged or serve.quantization == "dequantized"
    facts = footprint.read((base_store.original(source) if of_16_bits else source).path)
    longest = recipe.data.max_length
    stream = min(longest, serve.context_length or facts.context_length or longest)
    return plan.make(
        facts,
        serve,
        machine,
        mode="merged" if merged else "adapters",
        quantization=_FORMATS[serve.quantization],
        needed_tokens=max(USABLE_STREAMS * stream, serve.context_length),
        double=recipe.quantization.double,
    )


def _not_as_adapter(recipe: Recipe) -> list[str]:
    """Why the recipe's adapter cannot be served beside its base."""
    lora, found = recipe.lora, []
    if lora.largest_rank > recipe.serve.max_rank:
        found.append(f"lora.rank = {lora.largest_rank} is over serve.max_rank = {recipe.serve.max_rank}")
    if recipe.train.method == "full":
        return ["full training makes a checkpoint, not an adapter"]
    if lora.dora:
        found.append("SGLang has no DoRA")
    modules = PROJECTIONS if isinstance(lora.target_modules, str) else lora.target_modules
    return found + [f"the adapter {reason.fact}" for reason in unserved_modules(m.rpartition(".")[2] for m in modules)]


def _not_on_nf4(recipe: Recipe) -> list[str]:
    if recipe.quantization.method == "nf4":
        return []
    bits = "FP4" if recipe.quantization.method == "fp4" else "16-bit"
    return [f"the adapter is trained on {bits} weights, and on the NF4 base its answers would be others"]


def _faster(recipe: Recipe, source: ModelSource, machine: Hardware) -> str:
    """What to add where NF4 is wanted and there is memory for the same values in 16 bits; measured on GPUs alone."""
    serve = recipe.serve
    if serve.quantization != "nf4" or recipe.quantization.method != "nf4" or not machine.gpus:
        return ""
    try:
        dequantized = _plan(recipe, source, machine, serve.model_copy(update={"quantization": "dequantized"}))
    except ArtifactError:  # of an NF4 base whose original is gone, which serves as it is
        return ""
    if not dequantized.fits:
        return ""
    return (
        f"; the same values in 16 bits would fit too, {gib(dequantized.weights_bytes)} of them, and answer faster: "
        "--serve.quantization dequantized"
    )


def _neither(
    recipe: Recipe, source: ModelSource, machine: Hardware, merged: ServingPlan, adapters: Serve, why_not: list[str]
) -> PlanError:
    if why_not:
        reasons = f"{_short(merged)}; and as an adapter it cannot be served: {'; '.join(why_not)}"
        return PlanError(reasons, hint=_hint(recipe, source, machine, adapters.model_copy(update={"mode": "merged"})))
    on_nf4 = _plan(recipe, source, machine, adapters)
    return PlanError(f"{_short(merged)}; {_short(on_nf4)}", hint=_hint(recipe, source, machine, adapters))


def _short(planned: ServingPlan) -> str:
    name = "merged" if planned.mode == "merged" else f"with adapters ({planned.quantization})"
    terms = f"{gib(planned.weights_bytes)} of weights"
    if planned.slots:
        terms += f" and {gib(planned.slots_bytes)} of {planned.slots} adapter slots"
    return (
        f"{name}, {terms} leave {planned.kv_tokens:,} tokens of KV cache on {planned.device} "
        f"({gib(planned.device_bytes)}), and {planned.needed_tokens:,} are wanted"
    )


def _hint(recipe: Recipe, source: ModelSource, machine: Hardware, serve: Serve) -> str:
    """The smallest change that would fit, of each kind that there is."""
    found = [words for words, other in _changes(recipe, serve) if _plan(recipe, source, machine, other).fits]
    if found:
        return f"this would fit: {' or '.join(dict.fromkeys(found))}"
    return "choose a smaller base, a larger card, or a smaller data.max_length"


def _changes(recipe: Recipe, serve: Serve) -> Iterator[tuple[str, Serve]]:
    """(what to say, the settings), the mildest first; of each kind only the mildest that fits is of interest."""

    def changed(**values: object) -> Serve:
        return serve.model_copy(update=values)

    if serve.context_length:
        yield "--serve.context_length 0", changed(context_length=0)
    if serve.mode == "adapters":
        rank = recipe.lora.rank
        yield f"--serve.max_rank {rank}", changed(max_rank=rank)
        yield from ((f"--serve.max_loras {n}", changed(max_loras=n)) for n in (serve.max_loras // 2, 1) if n)
        yield f"--serve.max_loras 1 --serve.max_rank {rank}", changed(max_loras=1, max_rank=rank)
    if serve.quantization in {"none", "dequantized"} and not _not_as_adapter(recipe) and not _not_on_nf4(recipe):
        mode = "" if serve.mode == "adapters" else "--serve.mode adapters "
        yield f"{mode}--serve.quantization nf4", changed(mode="adapters", quantization="nf4")
