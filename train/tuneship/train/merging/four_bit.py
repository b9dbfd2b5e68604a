"""Four bits there and back, one tensor at a time in bounded memory: the base that a QLoRA adapter was trained on.

bitsandbytes packs blocks of 64 values, each with its own scale, so a tensor can go through in pieces. Only the scales
are packed all together (double quantization): their mean is taken off first.
"""

from __future__ import annotations

import torch
from bitsandbytes import functional
from torch import Tensor

_BLOCK = 64
"""Values that share a scale; bitsandbytes' default, which transformers does not change."""
_NESTED_BLOCK = 256
"""Scales that share a scale; bitsandbytes' own."""
_PIECE = 1 << 24
"""Values at a time: packing takes some 20 bytes of each on a CPU. A multiple of the block."""


def there_and_back(weight: Tensor, kind: str, *, double: bool) -> Tensor:
    """What bitsandbytes computes with in place of `weight` (F16, BF16 or F32): the same shape, dtype and device.

    `kind` is nf4 or fp4.

    To the last bit what `dequantize()` of the loaded 4-bit model gives, if the dtype and the kind of device are those
    of training.
    """
    out = weight.flatten().clone()
    pieces = out.split(_PIECE)
    packed = [functional.quantize_4bit(piece, blocksize=_BLOCK, quant_type=kind) for piece in pieces]
    scales = torch.cat([state.absmax for _, state in packed])
    if double:
        scales = _scales_there_and_back(scales)
    for piece, (data, state), absmax in zip(pieces, packed, scales.split(_PIECE // _BLOCK), strict=True):
        state.absmax = absmax
        piece.copy_(functional.dequantize_4bit(data, state).view(-1))
    return out.view(weight.shape)


def _scales_there_and_back(absmax: Tensor) -> Tensor:
    offset = absmax.mean()
    packed, state = functional.quantize_blockwise(absmax - offset, blocksize=_NESTED_BLOCK)
    return functional.dequantize_blockwise(packed, state) + offset
