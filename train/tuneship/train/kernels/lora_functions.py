"""LoRA over frozen layers as autograd functions: what `fused.py` puts into a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812 - its usual name

from tuneship.train.kernels import swiglu


class Frozen(NamedTuple):
    """A frozen linear layer: how its weight is read, and how its adapter is scaled."""

    weight: Callable[[torch.dtype], Tensor]
    """-> [out, in]"""
    bias: Tensor | None
    scaling: float


def freeze(layer: Any) -> Frozen:
    """What of a LoRA layer does not change."""
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


class Linears(torch.autograd.Function):
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


class SwiGlu(torch.autograd.Function):
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
