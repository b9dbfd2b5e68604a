"""How much memory a training step takes, by term: arithmetic over the model's shape, nothing loaded.

What a layer keeps for its backward was counted tensor by tensor (in the values of one token) and agrees with measured
peaks of a 1.5B Qwen2 on an H100; how much is alive beside it while one layer is walked back was fitted to them.
`probe.py` measures the rest.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from tuneship.core.recipe import Recipe
from tuneship.core.shape import Shape

LOSS_TOKENS, _LOSS_VOCAB = 4096, 32768
"""The LM head's tile in TRL: logits of so many tokens over so much of the vocabulary are in memory at a time."""
CONTEXT_BYTES = int(0.6 * 2**30)
"""CUDA's context, its libraries and their workspaces, before a tensor is made; a probe measures it."""


class Setting(NamedTuple):
    """How a step is cut: rows at a time, and how many layers keep their activations instead of computing them again."""

    micro_batch: int
    kept_layers: int

    def checkpointing(self, shape: Shape) -> bool:
        """Whether any layer is computed again."""
        return self.kept_layers < shape.layers


class Memory(NamedTuple):
    """Bytes of the training process on its device."""

    weights: int
    """The frozen base, its quantization state, and what is dequantized of it at a time."""
    adapter: int
    """Weights, gradients, moments."""
    activations: int
    """Kept from forward to backward."""
    working: int
    """Alive within one layer's backward, or within the loss's: whichever is more."""
    context: int

    @property
    def total(self) -> int:
        """The peak."""
        return sum(self)


def estimate(recipe: Recipe, shape: Shape, setting: Setting, longest: int, *, even: bool = False) -> Memory:
    """Peak memory of a step over `setting.micro_batch` rows of `longest` tokens, 16-bit values, on a GPU.

    `even`: all rows are as long as the longest, so there is no padding and no mask.
    """
    tokens = setting.micro_batch * longest
    padded = setting.micro_batch > 1 and not even
    layer = 2 * _values_kept(shape, recipe, padded=padded)
    inputs = 2 * shape.hidden
    # The embedding's output, the last norm's copies and output; with padding, a mask that all layers share.
    around = 2 * 5 * shape.hidden + (3 * longest if padded else 0)
    again = shape.layers - setting.kept_layers
    kept = setting.kept_layers * layer + again * inputs + around
    backward = (layer if again else 0) + 2 * _values_alive(shape, recipe, padded=padded)
    loss = 8 * shape.hidden * tokens + 2 * min(tokens, LOSS_TOKENS) * min(_LOSS_VOCAB, shape.vocab)
    full = recipe.train.method == "full"
    learning = _parameters(shape) if full else shape.lora_parameters(recipe.lora.rank)
    return Memory(
        weights=_weights(recipe, shape),
        adapter=int(_adapter_bytes(recipe) * learning),
        activations=int(kept * tokens),
        working=int(max(backward * tokens, loss)),
        context=CONTEXT_BYTES,
    )


def _weights(recipe: Recipe, shape: Shape) -> int:
    if recipe.train.method == "full":  # they learn in float32: only what autocast keeps of them in 16 bits comes beside
        return 2 * _parameters(shape)
    embeddings = 2 * shape.embedding_parameters
    if recipe.quantization.method == "none":
        return 2 * shape.linear_parameters + embeddings
    # Half a byte a weight, a scale for 64 of them: a byte where scales are packed too, else four.
    scale = 1 / 64 if recipe.quantization.double else 4 / 64
    dense = 2 * 2 * shape.hidden * shape.intermediate
    unpacked = 4 / 64 if _is_fused(recipe) else 0
    return math.ceil(shape.linear_parameters * (0.5 + scale + unpacked)) + embeddings + dense


def _parameters(shape: Shape) -> int:
    return shape.linear_parameters + shape.embedding_parameters


def _adapter_bytes(recipe: Recipe) -> float:
    """Of one parameter that learns: TRL keeps adapters of a quantized base in bf16; all others are in fp32."""
    value = 4 if recipe.quantization.method == "none" else 2
    moments = 2 * value if recipe.train.optimizer in {"adamw", "paged_adamw"} else 2
    return 2 * value + moments


def _values_kept(shape: Shape, recipe: Recipe, *, padded: bool) -> float:
    """What one layer keeps of one token, in values of two bytes."""
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    # Query, the attention's output, key and value; a padding mask needs key and value of every head.
    attention = 2 * query + 2 * (query if padded else key)
    # Of the norms the inputs, in float32 without Liger, and the outputs. Of the MLP gate, up, their product, and
    # without Liger the activation; fused functions compute the product again.
    plain = recipe.train.liger is False
    norms = 6 if plain else 4
    wide = 2 if _is_fused(recipe) else 4 if plain else 3
    return attention + norms * shape.hidden + wide * shape.intermediate


def _values_alive(shape: Shape, recipe: Recipe, *, padded: bool) -> float:
    """What is alive of one token beside it while a layer is walked back, in values of two bytes."""
    heads = 4 * shape.heads * shape.head_dim if padded else 0
    if _is_fused(recipe):
        return heads + 2.0 * shape.hidden
    return heads + (4 if recipe.train.liger is False else 1) * shape.hidden + 0.7 * shape.intermediate


def _is_fused(recipe: Recipe) -> bool:
    """Whether `fused.py` takes its layers."""
    plain = not recipe.lora.dropout and not recipe.lora.dora
    return plain and recipe.train.kernels != "peft" and recipe.train.method != "full"
