"""What a model, an adapter slot and a token of KV cache take in SGLang's memory: arithmetic over what lies on the disk.

    facts = read(Path("models/base"))            # config.json and the headers of the weights; nothing is loaded
    weights_bytes(facts, "nf4", width=2)
    slot_bytes(facts.shape, rank=64, width=2)
    kv_bytes_per_token(facts.shape, width=2)

All three are SGLang's own allocations to the byte (`tests/integration/test_plan_memory.py` holds them against a real
0.5.17), for decoders of which every layer attends to everything. Others are refused: their pools have other shapes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tuneship.core import checkpoint
from tuneship.core.errors import ArtifactError, PlanError
from tuneship.core.quoting import on_one_line
from tuneship.core.servable import FUSED
from tuneship.core.shape import Shape
from tuneship.serve import quantized, tensors

Format = Literal["none", "nf4", "fp8"]

_VOCAB_ROWS = 64
"""SGLang rounds the embedding's and the head's rows up to a multiple of it."""
_NF4_BLOCK, _NF4_NESTED_BLOCK = 64, 256
_NF4_MAP_BYTES, _NF4_NESTED_MAP_BYTES = 16 * 4, 256 * 4
_SCALE_BYTES = 4
_FILE_WIDTH = 4
"""Adapters are float32 files as a rule, and SGLang keeps them in memory as they lie on the disk."""
_OTHER_POOLS = ("num_experts", "num_local_experts", "n_routed_experts", "kv_lora_rank", "mamba_d_state", "ssm_cfg")


class Facts(NamedTuple):
    """A checkpoint, as far as its memory goes."""

    shape: Shape
    context_length: int
    matrices: tuple[tuple[int, int], ...]
    """(out, in) of the linear layers that NF4 and FP8 pack; of packed weights as they were before."""
    others: int
    """Values of everything else, in 16 bits whatever the rest is: embedding, head (once when tied), norms, biases."""
    stored: str
    """How the matrices lie on the disk: `none`, `nf4`, or another method by its name."""
    double: bool
    stored_bytes: int
    """Of all weights on the disk."""


def read(folder: Path) -> Facts:
    """The facts about the checkpoint in `folder`.

    Raises:
        ArtifactError: no checkpoint.
        PlanError: an architecture whose memory this arithmetic does not know.

    """
    config = checkpoint.read_config(folder)
    _refuse_other_pools(config, folder)
    record = quantized.weights(folder)
    shape = Shape.of(config)
    found = _Weights.read(folder, skip_head=shape.tied)
    text = config.get("text_config", config)
    return Facts(
        shape=shape,
        context_length=int(text.get("max_position_embeddings") or 0),
        matrices=found.matrices,
        others=found.others + _padding(shape),
        stored=record.method,
        double=record.double,
        stored_bytes=found.stored_bytes,
    )


def weights_bytes(facts: Facts, method: Format, width: int, *, double: bool = True) -> int:
    """Weights of a server that holds its matrices as `method`, everything else in values of `width` bytes.

    A checkpoint that is packed in a way of its own stays as it lies on the disk.
    """
    if facts.stored not in {"none", "nf4"}:
        return facts.stored_bytes
    others = facts.others * width
    if facts.stored == "nf4":
        method, double = "nf4", facts.double
    if method == "nf4":
        return others + sum(_nf4_bytes(rows * columns, width, double=double) for rows, columns in facts.matrices)
    if method == "fp8":
        return others + sum(rows * columns + _SCALE_BYTES * rows for rows, columns in facts.matrices)
    return others + width * sum(rows * columns for rows, columns in facts.matrices)


def slot_bytes(shape: Shape, rank: int, width: int) -> int:
    """One slot for adapters of at most `rank` on all projections (SGLang's lora/mem_pool.py).

    q, k, v share one layer, and so do gate and up: such a layer keeps one A of rank values for each part, and one B.
    """
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    a = len(FUSED["qkv_proj"]) * shape.hidden + q + len(FUSED["gate_up_proj"]) * shape.hidden + shape.intermediate
    b = (q + 2 * kv) + shape.hidden + 2 * shape.intermediate + shape.hidden
    return shape.layers * rank * (a + b) * width


def kv_bytes_per_token(shape: Shape, width: int) -> int:
    """Keys and values of one token in all layers."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * width


def adapter_host_bytes(shape: Shape, rank: int) -> int:
    """A loaded adapter in the machine's own memory, whether it has a slot or not."""
    return shape.lora_parameters(rank) * _FILE_WIDTH


class _Weights(NamedTuple):
    """Sums over the headers of a checkpoint's files."""

    matrices: tuple[tuple[int, int], ...]
    others: int
    stored_bytes: int

    @classmethod
    def read(cls, folder: Path, *, skip_head: bool) -> _Weights:
        matrices: list[tuple[int, int]] = []
        others = stored = 0
        for file in sorted(folder.glob("*.safetensors")):
            listed = tensors.headers(file)
            for key, tensor in listed.items():
                if skip_head and key.startswith("lm_head."):
                    continue
                stored += tensor.end - tensor.start
                packed = listed.get(f"{key}{tensors.NF4_STATE}")
                if packed:
                    matrices.append(tensors.nf4_shape(file, packed))
                elif _is_matrix(key, tensor.shape):
                    matrices.append((tensor.shape[0], tensor.shape[1]))
                elif ".weight." not in key:  # what is behind a packed weight's name are its scales
                    others += math.prod(tensor.shape)
        if not stored:
            raise ArtifactError(f"{folder} has no *.safetensors weights")
        return cls(tuple(matrices), others, stored)


def _is_matrix(key: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and ".layers." in key and key.endswith(".weight")


def _nf4_bytes(values: int, width: int, *, double: bool) -> int:
    """One packed matrix with its scales as bitsandbytes keeps them; the mean of quantized scales is one more value."""
    blocks = math.ceil(values / _NF4_BLOCK)
    if not double:
        return values // 2 + _NF4_MAP_BYTES + _SCALE_BYTES * blocks
    nested = _NF4_NESTED_MAP_BYTES + _SCALE_BYTES * math.ceil(blocks / _NF4_NESTED_BLOCK) + width
    return values // 2 + _NF4_MAP_BYTES + blocks + nested


def _padding(shape: Shape) -> int:
    rows = -shape.vocab % _VOCAB_ROWS
    return rows * shape.hidden * (1 if shape.tied else 2)


def _refuse_other_pools(config: Mapping[str, Any], folder: Path) -> None:
    text = config.get("text_config", config)
    why = [key for key in _OTHER_POOLS if text.get(key)]
    why += sorted(set(text.get("layer_types") or ()) - {"full_attention"})
    if not {"hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"} <= text.keys():
        why.append("no sizes of a decoder")
    if why:
        raise PlanError(
            f"the memory of a server for {folder.name} cannot be planned: its configuration has "
            f"{on_one_line(', '.join(why))}, and only dense decoders with full attention are known here",
            hint="name serve.mode; SGLang decides when it starts",
        )
