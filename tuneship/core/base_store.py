"""Quantized bases, each written once: where they lie, and which one is wanted.

An NF4 base is an artifact of kind `base-nf4`; its values written out in 16 bits are one of kind `base-dequantized`. The
manifest's `base` is the 16-bit model that either was made of, so an adapter that names the same model fits both. What
it was asked to be made of, and how, is its `input_id`: whoever wants the same base finds it by that.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tuneship.core import artifact, checkpoint
from tuneship.core.artifact import Artifact, Kind
from tuneship.core.cache import cache_dir
from tuneship.core.errors import ArtifactError
from tuneship.core.files import sha256_text
from tuneship.core.model_source import ModelSource, resolve

NF4: Kind = "base-nf4"
DEQUANTIZED: Kind = "base-dequantized"
KINDS = {"nf4": NF4, "dequantized": DEQUANTIZED}
"""By the name that `serve.quantization` has for them."""
_VERSION = 1
"""Raised when a build would make something else of the same inputs."""


class Wanted(NamedTuple):
    """A base: of what, with or without double quantization (of the scales), packed or dequantized.

    `parents` are content ids of artifacts whose values it has, where it was asked for through one.
    """

    source: ModelSource
    double: bool = True
    kind: Kind = NF4
    parents: tuple[str, ...] = ()

    @property
    def input_id(self) -> str:
        """Hex SHA-256 over all that decides what is written: weights, tokenizer, template and settings."""
        path = self.source.path
        parts = (checkpoint.weights_sha256(path), checkpoint.tokenizer_sha256(path), checkpoint.chat_template(path))
        return sha256_text("\n".join([self.kind, str(_VERSION), *parts, f"double={self.double}"]))


def default_folder() -> Path:
    """Where bases are written unless told otherwise: a cache, since each can be built again."""
    return cache_dir() / "bases"


def want(source: ModelSource, kind: Kind, *, double: bool = True) -> Wanted:
    """The base of `kind` that belongs to `source`: of an NF4 base the values that it packs, whatever `double` is.

    Raises:
        ArtifactError: that NF4 base's original is not on this disk any more.

    """
    packed = artifact.quantized_base(source.path)
    if packed and packed.kind == NF4 and kind == DEQUANTIZED:
        return Wanted(original(source), packed.quantization.double, kind, (packed.content_id,))
    return Wanted(source, double, kind)


def find(wanted: Wanted, folder: Path) -> Artifact | None:
    """The base in `folder` that is `wanted`, every byte checked; a damaged one is none."""
    identity = wanted.input_id
    for path in sorted(folder.glob(f"{wanted.kind}-*")):
        try:
            if artifact.read_manifest(path).input_id == identity:
                return artifact.open_artifact(path, kind=wanted.kind)
        except ArtifactError:  # it will be built again, and replaced
            continue
    return None


def original(source: ModelSource) -> ModelSource:
    """The 16-bit model that the base of ours at `source` was made of; any other model itself.

    Raises:
        ArtifactError: it is not on this disk any more.

    """
    manifest = artifact.quantized_base(source.path)
    return resolve(manifest.base.id, manifest.base.revision) if manifest else source
