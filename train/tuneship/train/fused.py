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
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812 - its usual name

from tuneship.train import swiglu

_SIBLINGS = (("q_proj", "k_proj", "v_proj"),)
_MLP = ("gate_proj", "up_proj", "down_proj")


class Installed(NamedTuple):
    """How many modules compute with which function."""

    mlps: int
    groups: int
    layers: int


class Frozen(NamedTuple):
    """A frozen linear layer: how its weight is read, and how its adapter is scaled."""

    weight: Callable[[torch.dtype], Tensor]
    """-> [out, in]"""
    bias: Tensor | None
    scaling: float


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
    layers = [getattr(module, name, None) for name in _MLP]
    act = getattr(module, "act_fn", None)
    silu = isinstance(act, nn.SiLU) or type(act).__name__ == "SiLUActivation"
    return silu and all(_is_plain(layer) for layer in layers)


def _computes_here(layers: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and not any(
        layer.disable_adapters or layer.merged or not layer.training for layer in layers
    )


def _mlp_forward(layers: Sequence[Any], peft: Callable[..., Tensor]) -> Callable[..., Tensor]:
    frozen = tuple(_freeze(layer) for layer in layers)

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not _computes_here(layers):
            return peft(x, *args, **kwargs)
        out: Tensor = _SwiGlu.apply(x, frozen, *_adapters(layers))
        return out

    return forward


class _Shared:
    """Sibling layers, called one after another on one input: the first call computes all of them."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self._layers = layers
        self._peft = [layer.forward for layer in layers]
        self._frozen = tuple(_freeze(layer) for layer in layers)
        self._input: Tensor | None = None
        self._outputs: list[Tensor | None] = []

    def forward_of(self, index: int) -> Callable[..., Tensor]:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not _computes_here(self._layers):
                return self._peft[index](x, *args, **kwargs)
            if index == 0:
                self._input, self._outputs = x, list(_Linears.apply(x, self._frozen, *_adapters(self._layers)))
            elif x is not self._input:
                (alone,) = _Linears.apply(
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


def _freeze(layer: Any) -> Frozen:
    base = layer.get_base_layer()
    return Frozen(_reader(base), base.bias, layer.scaling[layer.active_adapters[0]])


def _reader(base: nn.Linear) -> Callable[[torch.dtype], Tensor]:
    """How the dense weight is read. Packed scales are unpacked once: 1/16 byte a weight, for two kernels less."""
    weight: Any = base.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        return lambda dtype: base.weight.to(dtype)  # noqa: PLW0108 - the weight may be replaced
    from bitsandbytes.functional import dequantize_blockwise  # noqa: PLC0415 - only where weights are packed

    absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    absmax, kind, shape = absmax.float(), state.quant_type, tuple(state.shape)

    def read(dtype: torch.dtype) -> Tensor:
        return torch.ops.bitsandbytes.dequantize_4bit.default(
            weight.data.view(-1, 1), absmax, state.blocksize, kind, shape, dtype
        )

    return read


def _compute_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _Linears(torch.autograd.Function):
    """Frozen linear layers with LoRA over one input: x [..., in] -> (y_i [..., out_i]).

    y_i = x W_i^T + b_i + (x (s_i A_i)^T) B_i^T
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, frozen: tuple[Frozen, ...], *adapters: Tensor) -> tuple[Tensor, ...]:
        dtype = _compute_dtype(x)
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        down = _scaled(frozen, adapters[0::2], dtype)
        hidden = flat @ down.t()
        outs, at = [], 0
        for layer, b in zip(frozen, adapters[1::2], strict=True):
            out = F.linear(flat, layer.weight(dtype), layer.bias)
            out.addmm_(hidden[:, at : at + b.shape[1]], b.to(dtype).t())
            outs.append(out.view(*x.shape[:-1], -1))
            at += b.shape[1]
        ctx.save_for_backward(flat, hidden, down, *adapters)
        ctx.frozen, ctx.shape, ctx.dtype = frozen, x.shape, x.dtype
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat, hidden, down, *adapters = ctx.saved_tensors
        dtype, downs, ups = flat.dtype, adapters[0::2], adapters[1::2]
        grad_hiddens, grad_ups, grad_x, at = [], [], None, 0
        for layer, b, grad in zip(ctx.frozen, ups, grads, strict=True):
            flat_grad = grad.reshape(-1, grad.shape[-1])
            grad_hiddens.append(flat_grad @ b.to(dtype))
            grad_ups.append((flat_grad.t() @ hidden[:, at : at + b.shape[1]]).to(b.dtype))
            if ctx.needs_input_grad[0]:
                weight = layer.weight(dtype)
                grad_x = flat_grad @ weight if grad_x is None else grad_x.addmm_(flat_grad, weight)
            at += b.shape[1]
        grad_hidden = _joined(grad_hiddens, 1)
        grad_downs = _unscaled(ctx.frozen, grad_hidden.t() @ flat, downs)
        if grad_x is not None:
            grad_x = grad_x.addmm_(grad_hidden, down).view(ctx.shape).to(ctx.dtype)
        pairs = [half for pair in zip(grad_downs, grad_ups, strict=True) for half in pair]
        return grad_x, None, *pairs


class _SwiGlu(torch.autograd.Function):
    """A SwiGLU MLP with LoRA on its three layers: down(silu(gate(x)) * up(x)).

    Kept for backward: x, both wide outputs, and what the adapters' first halves made. The backward overwrites the two
    wide tensors, so a graph can be walked once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, frozen: tuple[Frozen, ...], *adapters: Tensor) -> Tensor:
        dtype = _compute_dtype(x)
        gate, up, down = frozen
        a_gate, b_gate, a_up, b_up, a_down, b_down = adapters
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        a_in, a_out = _scaled((gate, up), (a_gate, a_up), dtype), _scaled((down,), (a_down,), dtype)
        hidden, rank = flat @ a_in.t(), a_gate.shape[0]
        wide_gate = F.linear(flat, gate.weight(dtype), gate.bias)
        wide_gate.addmm_(hidden[:, :rank], b_gate.to(dtype).t())
        wide_up = F.linear(flat, up.weight(dtype), up.bias)
        wide_up.addmm_(hidden[:, rank:], b_up.to(dtype).t())
        act = swiglu.forward(wide_gate, wide_up)
        hidden_down = act @ a_out.t()
        out = F.linear(act, down.weight(dtype), down.bias)
        out.addmm_(hidden_down, b_down.to(dtype).t())
        ctx.save_for_backward(flat, hidden, wide_gate, wide_up, hidden_down, a_in, a_out, *adapters)
        ctx.frozen, ctx.shape, ctx.dtype = frozen, x.shape, x.dtype
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, hidden, wide_gate, wide_up, hidden_down, a_in, a_out, *adapters = ctx.saved_tensors
        gate, up, down = ctx.frozen
        a_gate, b_gate, a_up, b_up, a_down, b_down = adapters
        dtype, rank = flat.dtype, a_gate.shape[0]
        grad = grad.reshape(-1, grad.shape[-1])
        grad_hidden_down = grad @ b_down.to(dtype)
        grad_b_down = grad.t() @ hidden_down
        grad_act = (grad @ down.weight(dtype)).addmm_(grad_hidden_down, a_out)
        act, grad_gate, grad_up = swiglu.backward_(wide_gate, wide_up, grad_act)
        (grad_a_down,) = _unscaled((down,), grad_hidden_down.t() @ act, (a_down,))
        grad_hidden = _joined([grad_gate @ b_gate.to(dtype), grad_up @ b_up.to(dtype)], 1)
        grad_b_gate = grad_gate.t() @ hidden[:, :rank]
        grad_b_up = grad_up.t() @ hidden[:, rank:]
        grad_a_gate, grad_a_up = _unscaled((gate, up), grad_hidden.t() @ flat, (a_gate, a_up))
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_gate @ gate.weight(dtype)).addmm_(grad_up, up.weight(dtype))
            grad_x = grad_x.addmm_(grad_hidden, a_in).view(ctx.shape).to(ctx.dtype)
        found = (grad_a_gate, grad_b_gate, grad_a_up, grad_b_up, grad_a_down, grad_b_down)
        return grad_x, None, *(g.to(half.dtype) for g, half in zip(found, adapters, strict=True))


def _scaled(frozen: Sequence[Frozen], downs: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """s_i A_i one below the other: scaled where they are small, not where a batch has gone through them."""
    scalings = [layer.scaling for layer in frozen]
    if len(set(scalings)) == 1:
        return (_joined(downs, 0) * scalings[0]).to(dtype)
    return torch.cat([a * scaling for scaling, a in zip(scalings, downs, strict=True)]).to(dtype)


def _unscaled(frozen: Sequence[Frozen], grad: Tensor, downs: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of each A, from that of `_scaled`."""
    scalings = [layer.scaling for layer in frozen]
    if len(set(scalings)) == 1:
        grad, scalings = grad * scalings[0], [1.0] * len(scalings)
    parts = grad.split([a.shape[0] for a in downs])
    parts = tuple(part if scaling == 1 else part * scaling for part, scaling in zip(parts, scalings, strict=True))
    return [part.to(a.dtype) for part, a in zip(parts, downs, strict=True)]


def _joined(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return torch.cat(tuple(tensors), dim) if len(tensors) > 1 else tensors[0]
