"""Can this adapter be served on this base? Answered from files alone, before any engine is started.

SGLang finds out late: a wrong shape ends the whole server at the first request, and what it does not know (rsLoRA, rank
and alpha patterns, saved modules) it ignores and answers wrongly. So all of that is refused here, by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from tuneship.core import artifact, checkpoint
from tuneship.core.artifact import Artifact, Base
from tuneship.core.errors import ArtifactError, PreflightError
from tuneship.core.files import sha256_text
from tuneship.core.model_source import ModelSource
from tuneship.serve import tensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a decoder block that our servers wrap with LoRA."""

_PREFIX = "base_model.model."
# {adapter_config.json key: what SGLang makes of it}. All of them change the answer.
_UNSERVED = {
    "use_dora": "DoRA is not supported by SGLang",
    "modules_to_save": "SGLang drops the modules that were saved whole",
    "trainable_token_indices": "SGLang drops the tokens that were trained",
    "use_rslora": "SGLang scales with alpha / rank whatever it says",
    "rank_pattern": "SGLang knows one rank for an adapter",
    "alpha_pattern": "SGLang knows one alpha for an adapter",
}


class BaseModel(NamedTuple):
    """The base, as far as an adapter has to agree with it. `shapes` are of its weights: {key: (out, in)}."""

    path: Path
    record: Base
    template_sha256: str
    tokenizer_sha256: str
    shapes: dict[str, tuple[int, ...]]


class CheckedAdapter(NamedTuple):
    """An adapter that can be served. `name` is the recipe's, else the directory's."""

    name: str
    content_id: str


def read_base(source: ModelSource) -> BaseModel:
    """Everything about the base that adapters are held against.

    Raises:
        ArtifactError: not a checkpoint, or one that is cut short.

    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(source.path.glob("*.safetensors")):
        shapes |= tensors.shapes(file)
    return BaseModel(
        path=source.path,
        record=checkpoint.identify(source.path, source.id, source.revision),
        template_sha256=sha256_text(checkpoint.chat_template(source.path)),
        tokenizer_sha256=checkpoint.tokenizer_sha256(source.path),
        shapes=shapes,
    )


def is_adapter(path: Path) -> bool:
    """Whether the directory at `path` wants to be an adapter; hidden ones are somebody's work in progress."""
    if path.name.startswith(".") or not path.is_dir():
        return False
    if artifact.is_artifact(path):
        return artifact.read_manifest(path).kind == "adapter"
    return (path / CONFIG).is_file() or (path / WEIGHTS).is_file()


def check(path: Path, base: BaseModel, max_rank: int) -> CheckedAdapter:
    """Hold the adapter at `path` against `base` and the server's limit.

    Raises:
        ArtifactError: it was changed, is cut short, or was trained on another base.
        PreflightError: it is whole, and cannot be served here.

    """
    opened = artifact.open_artifact(path, kind="adapter") if artifact.is_artifact(path) else None
    if opened:
        _check_origin(opened, base)
    name = (opened.manifest.name if opened else "") or path.name
    config = _read_config(path)
    _check_config(name, config, max_rank)
    _check_shapes(name, path, int(config["r"]), base)
    identity = opened.manifest.content_id if opened else artifact.content_id(artifact.hash_payload(path))
    return CheckedAdapter(name, identity)


def _check_origin(opened: Artifact, base: BaseModel) -> None:
    manifest, name = opened.manifest, opened.path.name
    artifact.check_base(opened, base.record.weights_sha256, base.record.id)
    if manifest.template.sha256 != base.template_sha256:
        raise PreflightError(
            f"{name} was trained with another chat template than {base.record.id} has",
            hint="merge it (`tuneship merge`): a merged model carries its template with it",
        )
    if manifest.tokenizer_sha256 != base.tokenizer_sha256:
        raise PreflightError(
            f"{name} was trained with another tokenizer than {base.record.id} has",
            hint=f"use the base {manifest.base.id} at revision {manifest.base.revision}",
        )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        int(config["r"]), float(config["lora_alpha"]), config["peft_type"], config["target_modules"]
    except OSError:
        raise ArtifactError(f"{path} has no {CONFIG}", hint="save it again with PEFT's save_pretrained") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path / CONFIG} is not an adapter's configuration: {error!r}") from None
    return dict(config)


def _check_config(name: str, config: dict[str, Any], max_rank: int) -> None:
    merge = "merge it (`tuneship merge`) and serve the merged model"
    if config["peft_type"] != "LORA":
        raise PreflightError(f"adapter {name!r} is {config['peft_type']}, not LoRA", hint=merge)
    for key, reason in _UNSERVED.items():
        if config.get(key):
            raise PreflightError(f"adapter {name!r} uses {key}: {reason}", hint=merge)
    if config.get("bias", "none") != "none":
        raise PreflightError(f"adapter {name!r} trains biases: SGLang drops them", hint=merge)
    if config["r"] > max_rank:
        raise PreflightError(
            f"adapter {name!r} has rank {config['r']}, the server takes at most {max_rank}",
            hint=f"start with --max-rank {config['r']}",
        )
    if isinstance(config["target_modules"], str):
        raise PreflightError(
            f"adapter {name!r} names its modules by the pattern {config['target_modules']!r}", hint=merge
        )
    foreign = sorted(set(config["target_modules"]) - set(PROJECTIONS))
    if foreign:
        raise PreflightError(
            f"adapter {name!r} changes {', '.join(foreign)}; the server wraps {', '.join(PROJECTIONS)}", hint=merge
        )


def _check_shapes(name: str, path: Path, rank: int, base: BaseModel) -> None:
    """Every pair A (rank, in), B (out, rank) must fit a weight (out, in) of the base."""
    if not (path / WEIGHTS).is_file():
        raise ArtifactError(f"{path} has no {WEIGHTS}", hint="save it again with safe_serialization=True")
    for key, shape in tensors.shapes(path / WEIGHTS).items():
        module, _, half = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        weight = base.shapes.get(f"{module}.weight")
        if weight is None or half not in {"lora_A", "lora_B"}:
            raise PreflightError(f"adapter {name!r}: {base.record.id} has nothing for its tensor {key}")
        wanted = (rank, weight[1]) if half == "lora_A" else (weight[0], rank)
        if shape != wanted:
            raise PreflightError(
                f"adapter {name!r} does not fit {base.record.id}: {key} is {shape}, the base wants {wanted}",
                hint="serve it on the base that it was trained on",
            )
