"""The base, as far as an adapter has to agree with it; read once for all adapters."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tuneship.core import checkpoint
from tuneship.core.artifact import Base
from tuneship.core.files import sha256_text
from tuneship.core.model_source import ModelSource
from tuneship.serve import tensors


class BaseModel(NamedTuple):
    """What adapters are held against. `linear` are its matrices: {module: (out, in)}, packed ones as they were."""

    path: Path
    record: Base
    template_sha256: str
    tokenizer_sha256: str
    linear: dict[str, tuple[int, int]]
    vocab_size: int
    """Rows of the embedding that SGLang goes by; 0 where the configuration does not say."""


def read_base(source: ModelSource) -> BaseModel:
    """Everything about the base that adapters are held against.

    Raises:
        ArtifactError: not a checkpoint, or one that is cut short.

    """
    config = checkpoint.read_config(source.path)
    return BaseModel(
        path=source.path,
        record=checkpoint.identify(source.path, source.id, source.revision),
        template_sha256=sha256_text(checkpoint.chat_template(source.path)),
        tokenizer_sha256=checkpoint.tokenizer_sha256(source.path),
        linear=linear(source.path),
        vocab_size=int(config.get("text_config", config).get("vocab_size") or 0),
    )


def linear(folder: Path) -> dict[str, tuple[int, int]]:
    """{module: (out, in)} of the matrices of the checkpoint in `folder`, packed ones as they were.

    Raises:
        ArtifactError: a weight file that is none, or is cut short.

    """
    shapes: dict[str, tuple[int, ...]] = {}
    unpacked: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for key, tensor in tensors.headers(file).items():
            if key.endswith(tensors.NF4_STATE):
                unpacked[key.removesuffix(tensors.NF4_STATE)] = tensors.nf4_shape(file, tensor)
            elif key.endswith(tensors.PACKED_SHAPE):
                unpacked[f"{key.removesuffix(tensors.PACKED_SHAPE)}.weight"] = tensors.packed_shape(file, tensor)
            else:
                shapes[key] = tensor.shape
    return {
        key.removesuffix(".weight"): (shape[0], shape[1])
        for key, shape in (shapes | unpacked).items()
        if key.endswith(".weight") and len(shape) == 2
    }
