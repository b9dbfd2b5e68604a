"""What merging will do to every tensor of a base: decided from names, shapes and settings, before a weight is read.

    plan(base, adapter, config, skeleton) -> Plan(changes, untied)

Everything in the adapter must be understood, or it is refused by name: a tensor that is left out is a model that was
never trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from tuneship.core import servable
from tuneship.core.errors import ArtifactError
from tuneship.core.quoting import on_one_line, quoted

Shapes = Mapping[str, tuple[int, ...]]

_PREFIX = "base_model.model."
_A, _B, _MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
_EMBEDDING_A, _EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"


class Skeleton(NamedTuple):
    """Names in the base's model: `embedding` and `head` are keys of weights, `packed` those that NF4 packs."""

    embedding: str
    head: str
    tied: bool
    packed: frozenset[str]


class Delta(NamedTuple):
    """`scaling` B A is added to a weight. `a` and `b` are keys of the adapter; an embedding's product is transposed.

    With `magnitude` (DoRA) the rows of the sum get that norm.
    """

    a: str
    b: str
    scaling: float
    magnitude: str = ""
    transposed: bool = False


class Change(NamedTuple):
    """What the base's `source` becomes: with `delta` added, or `replaced` by the adapter's tensor of that key."""

    source: str
    delta: Delta | None = None
    replaced: str = ""


class Plan(NamedTuple):
    """`changes` by the key that is written; the rest of the base stays. `untied`: the head is no embedding any more."""

    changes: dict[str, Change]
    untied: bool


def plan(base: Shapes, adapter: Shapes, config: Mapping[str, Any], skeleton: Skeleton) -> Plan:
    """Hold the adapter's tensors against the base's.

    Args:
        base: of every tensor of the base's checkpoint.
        adapter: of every tensor of `adapter_model.safetensors`.
        config: `adapter_config.json`.
        skeleton: of the base's model.

    Raises:
        ArtifactError: a setting, a tensor or a shape that merging does not know.

    """
    _refuse_settings(config, skeleton)
    found = _deltas(adapter, config) | _saved_whole(adapter, config)
    unknown = sorted(adapter.keys() - _used(found))
    if unknown:
        raise ArtifactError(
            f"the adapter has tensors that merging does not know: {on_one_line(', '.join(unknown[:3]))}",
            hint=servable.REEXPORT,
        )
    if not found:
        raise ArtifactError("the adapter has no tensors", hint=servable.REEXPORT)
    # A tied head is the embedding: it has no tensor of its own, or one that is never read.
    sources = {key: skeleton.embedding if skeleton.tied and key == skeleton.head else key for key in found}
    changes = {key: change._replace(source=sources[key]) for key, change in found.items()}
    for key, change in changes.items():
        _check(key, change, base, adapter)
    untied = skeleton.tied and bool(changes.keys() & {skeleton.embedding, skeleton.head})
    if untied:
        changes.setdefault(skeleton.head, Change(skeleton.embedding))
    return Plan(changes, untied)


def _refuse_settings(config: Mapping[str, Any], skeleton: Skeleton) -> None:
    for reason in servable.unmerged(config):
        raise ArtifactError(f"the adapter cannot be merged: it {reason.fact}", hint=reason.fix)
    if config.get("ensure_weight_tying") and skeleton.tied:
        raise ArtifactError(
            "the adapter cannot be merged: it sets ensure_weight_tying on a base whose head is its embedding",
            hint="train it again with ensure_weight_tying = false",
        )


def _deltas(adapter: Shapes, config: Mapping[str, Any]) -> dict[str, Change]:
    modules = {_module(key, end): end for key in adapter for end in (_A, _EMBEDDING_A) if key.endswith(end)}
    layers = servable.layers(config, modules)
    found = {}
    for module, end in modules.items():
        embedding = end == _EMBEDDING_A
        magnitude = f"{_PREFIX}{module}{_MAGNITUDE}"
        found[f"{module}.weight"] = Change(
            f"{module}.weight",
            Delta(
                f"{_PREFIX}{module}{end}",
                f"{_PREFIX}{module}{_EMBEDDING_B if embedding else _B}",
                layers[module].scaling,
                magnitude if magnitude in adapter and not embedding else "",
                embedding,
            ),
        )
    return found


def _saved_whole(adapter: Shapes, config: Mapping[str, Any]) -> dict[str, Change]:
    """`modules_to_save`: PEFT writes them under the base's own names."""
    saved = tuple(config.get("modules_to_save") or ())
    keys = (key.removeprefix(_PREFIX) for key in adapter)
    whole = [key for key in keys if ".lora_" not in key and key.rpartition(".")[0].rpartition(".")[2] in saved]
    return {key: Change(key, replaced=f"{_PREFIX}{key}") for key in whole}


def _used(changes: Mapping[str, Change]) -> set[str]:
    deltas = [change.delta for change in changes.values() if change.delta]
    whole = {change.replaced for change in changes.values()}
    return {key for delta in deltas for key in (delta.a, delta.b, delta.magnitude)} | whole


def _check(key: str, change: Change, base: Shapes, adapter: Shapes) -> None:
    shape = base.get(change.source)
    if shape is None:
        raise ArtifactError(
            f"the base has no tensor {quoted(change.source)} for the adapter to change",
            hint="is it the base that the adapter was trained on? A checkpoint whose tensors are named in another way "
            "than in its model is merged by PEFT's merge_and_unload",
        )
    wanted: dict[str, tuple[int, ...]] = {change.replaced: shape} if change.replaced else {}
    if change.delta:
        rows, columns = reversed(shape) if change.delta.transposed else shape
        rank = adapter[change.delta.a][0]
        wanted = {change.delta.a: (rank, columns), change.delta.b: (rows, rank)}
        if change.delta.magnitude:
            wanted[change.delta.magnitude] = (rows,)
    for name, right in wanted.items():
        if name not in adapter:
            raise ArtifactError(f"the adapter is not whole: it lacks {on_one_line(name)}", hint=servable.REEXPORT)
        if adapter[name] != right:
            raise ArtifactError(
                f"the adapter does not fit: {on_one_line(name)} is {adapter[name]}, the base's {key} of {shape} wants "
                f"{right}",
                hint="merge into the base that it was trained on; a resized vocabulary cannot be merged",
            )


def _module(key: str, end: str) -> str:
    return key.removeprefix(_PREFIX).removesuffix(end)
