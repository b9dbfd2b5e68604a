"""SwiGLU in one pass forward and one pass backward: Triton on a GPU, plain PyTorch elsewhere.

The backward writes its three results over its three arguments: nothing as wide as the MLP is allocated.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

try:
    import triton  # type: ignore[import-untyped]
    import triton.language as tl  # type: ignore[import-untyped]
except ImportError:  # a machine without a GPU may lack it
    triton = None

_BLOCK = 1024


class Backward(NamedTuple):
    """The activation itself, and the gradients of both inputs."""

    act: Tensor
    grad_gate: Tensor
    grad_up: Tensor


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, computed in float32, of two contiguous tensors of one shape."""
    if not gate.is_cuda or triton is None:
        return (torch.nn.functional.silu(gate.float()) * up.float()).to(gate.dtype)
    out = torch.empty_like(gate)
    _forward[(triton.cdiv(out.numel(), _BLOCK),)](gate, up, out, out.numel(), BLOCK=_BLOCK)
    return out


def backward_(gate: Tensor, up: Tensor, grad: Tensor) -> Backward:
    """What backward needs, in place: the activation over `grad`, the gradients over `gate` and `up`."""
    if not gate.is_cuda or triton is None:
        g, u, d = gate.float(), up.float(), grad.float()
        sigmoid = torch.sigmoid(g)
        silu = g * sigmoid
        results = silu * u, d * u * (sigmoid + silu * (1 - sigmoid)), d * silu
        for place, result in zip((grad, gate, up), results, strict=True):
            place.copy_(result)
    else:
        _backward[(triton.cdiv(grad.numel(), _BLOCK),)](gate, up, grad, grad.numel(), BLOCK=_BLOCK)
    return Backward(grad, gate, up)


if triton is not None:
    # Without annotations: Triton looks their names up when it compiles, and knows no `Any`.

    @triton.jit
    def _forward(gate_ptr, up_ptr, out_ptr, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < count
        gate = tl.load(gate_ptr + at, mask=inside, other=0).to(tl.float32)
        up = tl.load(up_ptr + at, mask=inside, other=0).to(tl.float32)
        tl.store(out_ptr + at, gate * tl.sigmoid(gate) * up, mask=inside)

    @triton.jit
    def _backward(gate_ptr, up_ptr, grad_ptr, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < count
        gate = tl.load(gate_ptr + at, mask=inside, other=0).to(tl.float32)
        up = tl.load(up_ptr + at, mask=inside, other=0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=inside, other=0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        tl.store(grad_ptr + at, silu * up, mask=inside)
        tl.store(gate_ptr + at, grad * up * (sigmoid + silu * (1 - sigmoid)), mask=inside)
        tl.store(up_ptr + at, grad * silu, mask=inside)
