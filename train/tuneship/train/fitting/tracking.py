"""How fast a step was and what it took; and who else is told: trackio, TensorBoard, W&B, through the trainer."""

from __future__ import annotations

import importlib.util
import os
import resource
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from tuneship.core.errors import TrainError
from tuneship.core.shape import Shape

# Dense 16-bit tensor TFLOP/s by the makers' data sheets. The first name that stands in the card's own counts.
_TFLOPS = {
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "GH200": 989, "B200": 2250, "A100": 312,
    "L40S": 362, "L4": 121, "A10G": 70, "A10": 125, "RTX A6000": 155, "RTX 4090": 165, "RTX 3090": 71,
    "T4": 65, "V100": 125,
}  # fmt: skip


_PACKAGES = {"trackio": "trackio 'huggingface-hub<2'"}
"""What pip is told where a name is too little: trackio alone brings a huggingface-hub that transformers refuses."""


class Meter:
    """From step to step: tokens a second, share of the card's peak, memory.

    Args:
        shape: of the model.
        frozen: whether its own weights get no gradient, as with LoRA.

    """

    def __init__(self, shape: Shape, *, frozen: bool) -> None:
        # A product forward, one backward to its input, and one more to its weight where that learns. Attention's own
        # products are left out, as is what is computed twice to save memory.
        self._flop_per_token = (4 if frozen else 6) * (shape.linear_parameters + shape.vocab * shape.hidden)
        self._since = time.perf_counter()

    def start(self) -> None:
        """A step begins now."""
        self._since = time.perf_counter()

    def lap(self, tokens: int) -> dict[str, float | int | None]:
        """What the step that ends now did with `tokens` tokens that are no padding."""
        now = time.perf_counter()
        rate = tokens / max(now - self._since, 1e-9)
        self._since = now
        peak = peak_flops()
        return {
            "tokens_per_s": round(rate, 1),
            "mfu": round(rate * self._flop_per_token / peak, 4) if peak else None,
            "peak_memory_bytes": _peak_memory(),
        }


def peak_flops() -> float | None:
    """FLOP/s of this machine's first card in 16-bit products; None where nobody said."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((tflops * 1e12 for card, tflops in _TFLOPS.items() if card in name), None)


def _peak_memory() -> int:
    """Of this process, so far: on a GPU what PyTorch reserved there (without CUDA's context), else resident."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_reserved())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def require(trackers: Sequence[str]) -> None:
    """All of `trackers` are installed.

    Raises:
        TrainError: one is not; the hint installs it.

    """
    for name in trackers:
        if importlib.util.find_spec(name) is None:
            packages = _PACKAGES.get(name, name)
            raise TrainError(f"train.report_to names {name}, which is not installed", hint=f"pip install {packages}")


def prepare(trackers: Sequence[str], attempt: Path) -> None:
    """Where they write, unless their own variables say so."""
    if "tensorboard" in trackers:
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(attempt / "tensorboard"))
    if "wandb" in trackers:
        os.environ.setdefault("WANDB_PROJECT", "tuneship")
        os.environ.setdefault("WANDB_DIR", str(attempt))


def duration(seconds: float) -> str:
    """`3 h 12 min`, `4 min`, `20 s`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
