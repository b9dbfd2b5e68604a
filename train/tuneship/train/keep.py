"""Activation checkpointing of some layers: those that keep their activations are not computed again."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer


class KeepLayers(TrainerCallback):
    """Let the first `count` layers keep theirs once the trainer has switched checkpointing on for all."""

    def __init__(self, model: Any, count: int) -> None:
        self._layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)][:count]

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """After the trainer's own switch, before the first step."""
        for layer in self._layers:
            layer.gradient_checkpointing = False
