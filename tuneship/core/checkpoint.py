"""Facts about a HF checkpoint folder that need no torch: which weights, tokenizer, template, architecture."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tuneship.core.artifact import Base, quantized_base
from tuneship.core.cache import memo_sha256
from tuneship.core.errors import ArtifactError
from tuneship.core.files import sha256_listing

TEMPLATE_FILE = "chat_template.jinja"
_WEIGHTS = ("*.safetensors",)
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
_HUB_BLOB = re.compile(r"^[0-9a-f]{64}$")


def identify(path: Path, model_id: str, revision: str) -> Base:
    """Which base this folder is; of a quantized base of ours, the one that it was made of.

    Raises:
        ArtifactError: no `config.json`, or no safetensors weights.

    """
    quantized = quantized_base(path)
    if quantized:
        return quantized.base
    architectures = read_config(path).get("architectures") or ["unknown"]
    return Base(id=model_id, revision=revision, weights_sha256=weights_sha256(path), architecture=architectures[0])


def read_config(path: Path) -> dict[str, Any]:
    """`config.json` of the checkpoint at `path`.

    Raises:
        ArtifactError: there is none, or it holds something else.

    """
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except OSError:
        raise ArtifactError(f"{path} is not a model: it has no config.json") from None
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path / 'config.json'} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise ArtifactError(f"{path / 'config.json'} cannot be read: not a JSON object", hint="copy the model again")
    return config


def dtype(path: Path) -> str:
    """Of the weights at `path`, such as `bfloat16`, by its `config.json`; empty where that says nothing."""
    config = read_config(path)
    return str(config.get("dtype") or config.get("torch_dtype") or "")


def weights_sha256(path: Path) -> str:
    """Hex SHA-256 over the (name, size, sha256) of the weight files."""
    files = [file for pattern in _WEIGHTS for file in path.glob(pattern)]
    if not files:
        inside = next((found for depth in ("", "artifacts/") for found in sorted(path.glob(f"{depth}merged-*"))), None)
        raise ArtifactError(
            f"{path} has no *.safetensors weights",
            hint=f"the model in it is {inside}: name that" if inside else "convert pickled weights first",
        )
    return sha256_listing(_listed(file) for file in files)


def tokenizer_sha256(path: Path) -> str:
    """Hex SHA-256 over the files that decide which ids a text becomes; of a quantized base, of its original's files.

    transformers writes the same tokenizer in other bytes than it reads.
    """
    quantized = quantized_base(path)
    if quantized:
        return quantized.tokenizer_sha256
    files = [path / name for name in _TOKENIZER if (path / name).is_file()]
    if not files:
        raise ArtifactError(f"{path} has no tokenizer")
    return sha256_listing(_listed(file) for file in files)


def chat_template(path: Path) -> str:
    """The checkpoint's chat template; empty when it has none."""
    file = path / TEMPLATE_FILE
    if file.is_file():
        return file.read_text(encoding="utf-8")
    try:
        config = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return ""
    template = config.get("chat_template") or ""
    if isinstance(template, list):  # named templates: [{"name": "default", "template": ...}]
        template = next((entry["template"] for entry in template if entry["name"] == "default"), "")
    return str(template)


def end_token_ids(path: Path) -> list[int]:
    """Where the checkpoint says that generation ends: in `generation_config.json`, else in `config.json`."""
    for name in ("generation_config.json", "config.json"):
        try:
            ends = json.loads((path / name).read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, json.JSONDecodeError):
            continue
        if ends is not None:
            return [ends] if isinstance(ends, int) else list(ends)
    return []


def _listed(file: Path) -> tuple[str, int, str]:
    target = file.resolve()
    # The hub cache names large files by their SHA-256: reading them again would tell us nothing.
    known = target.name if file.is_symlink() and _HUB_BLOB.match(target.name) else memo_sha256(target)
    return file.name, target.stat().st_size, known
