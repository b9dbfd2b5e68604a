"""LoRA layers with fewer passes over memory: the same mathematics as PEFT's, as autograd functions of our own.

On a large GPU a QLoRA step waits less for its matrix products than for what stands between them: PEFT clones a frozen
layer's output, scales the adapter's and adds the two, seven passes over a tensor as wide as the MLP, and autograd keeps
what could be computed again. Here the adapter's product is accumulated into the frozen layer's output by the matrix
product itself, layers that read the same input share one pass over it, and a SwiGLU MLP keeps its two widest tensors
and no third. Values differ from PEFT's by rounding alone.

`install` puts them into a PEFT model whose LoRA is plain: no DoRA, no dropout, no bias, one adapter. Everything else,
and every forward outside training or with the adapter off, keeps PEFT's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from tuneship.train.kernels.lora_functions import Linears, SwiGlu, freeze

_SIBLINGS = (("q_proj", "k_proj", "v_proj"),)
_MLP = ("gate_proj", "up_proj", "down_proj")


class Installed(NamedTuple):
    """How many modules compute with which function."""

    mlps: int
    groups: int
    layers: int


def install(model: nn.Module, *, mlps: bool = True) -> Installed:
    """Let the LoRA layers of `model`, a PEFT model, compute with the functions of this module."""
    taken: set[int] = set()
    counts = {"mlps": 0, "groups": 0, "layers": 0}
    for module in model.modules():
        if mlps and _is_swiglu(module):
            layers = [getattr(module, name) for name in _MLP]
            _replace(module, _mlp_forward(layers, module.forward))
            taken |= {id(layer) for layer in layers}
            counts["mlps"] += 1
        for names in _SIBLINGS:
            group = [getattr(module, name, None) for name in names]
            if all(_is_plain(layer) for layer in group):
                shared = _Shared(group)
                for index, layer in enumerate(group):
                    _replace(layer, shared.forward_of(index))
                taken |= {id(layer) for layer in group}
                counts["groups"] += 1
    for module in model.modules():
        if id(module) not in taken and _is_plain(module):
            _replace(module, _Shared([module]).forward_of(0))
            counts["layers"] += 1
    return Installed(**counts)


def _replace(module: Any, forward: Callable[..., Any]) -> None:
    module.forward = MethodType(lambda _, *args, **kwargs: forward(*args, **kwargs), module)


def _is_plain(layer: Any) -> bool:
    """Whether it is a LoRA linear layer that these functions compute as PEFT does."""
    if not isinstance(layer, LoraLayer) or not _is_read(layer.get_base_layer()) or len(layer.active_adapters) != 1:
        return False
    (adapter,) = layer.active_adapters
    return (
        adapter in layer.lora_A
        and not layer.lora_variant
        and not layer.lora_bias[adapter]
        and not layer.fan_in_fan_out
        and isinstance(layer.lora_dropout[adapter], nn.Identity)
    )


def _is_read(base: Any) -> bool:
    """Whether its weight can be read: torch's own linear layer, or one in 4 bits that computes in its own dtype."""
    state = getattr(getattr(base, "weight", None), "quant_state", None)
    if state is None:
        return type(base) is nn.Linear
    return getattr(base, "compute_dtype", None) in {None, state.dtype}


def _is_swiglu(module: Any) -> bool:
    """Whether it is one; Liger's, which a process builds once a model of it trained with Liger, names no activation."""
    layers = [getattr(module, name, None) for name in _MLP]
    act = getattr(module, "act_fn", None)
    named = {type(act).__name__, type(module).__name__}
    silu = isinstance(act, nn.SiLU) or not named.isdisjoint({"SiLUActivation", "LigerSwiGLUMLP"})
    return silu and all(_is_plain(layer) for layer in layers)


def _computes_here(layers: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and not any(
        layer.disable_adapters or layer.merged or not layer.training for layer in layers
    )


def _mlp_forward(layers: Sequence[Any], peft: Callable[..., Tensor]) -> Callable[..., Tensor]:
    frozen = tuple(freeze(layer) for layer in layers)

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not _computes_here(layers):
            return peft(x, *args, **kwargs)
        out: Tensor = SwiGlu.apply(x, frozen, *_adapters(layers))
        return out

    return forward


class _Shared:
    """Sibling layers, called one after another on one input: the first call computes all of them."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self._layers = layers
        self._peft = [layer.forward for layer in layers]
        self._frozen = tuple(freeze(layer) for layer in layers)
        self._input: Tensor | None = None
        self._outputs: list[Tensor | None] = []

    def forward_of(self, index: int) -> Callable[..., Tensor]:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not _computes_here(self._layers):
                return self._peft[index](x, *args, **kwargs)
            if index == 0:
                self._input, self._outputs = x, list(Linears.apply(x, self._frozen, *_adapters(self._layers)))
            elif x is not self._input:
                (alone,) = Linears.apply(
                    x, self._frozen[index : index + 1], *_adapters(self._layers[index : index + 1])
                )
                return alone
            out, self._outputs[index] = self._outputs[index], None
            assert out is not None
            if index == len(self._outputs) - 1:
                self._input = None
            return out

        return forward


def _adapters(layers: Sequence[Any]) -> list[Tensor]:
    """A and B of each layer, one after another."""
    pairs = [(layer.lora_A[layer.active_adapters[0]], layer.lora_B[layer.active_adapters[0]]) for layer in layers]
    return [half.weight for pair in pairs for half in pair]
