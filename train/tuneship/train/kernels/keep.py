"""What is done to decoder layers for the length of a training: some keep their activations, all may be compiled."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer


def decoder_layers(model: Any) -> list[Any]:
    """The layers that can compute their activations again."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


class KeepLayers(TrainerCallback):
    """Let the first `count` layers keep theirs once the trainer has switched checkpointing on for all."""

    def __init__(self, model: Any, count: int) -> None:
        self._layers = decoder_layers(model)[:count]

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """After the trainer's own switch, before the first step."""
        for layer in self._layers:
            layer.gradient_checkpointing = False


class CompileLayers(TrainerCallback):
    """`torch.compile` of each layer while it is trained: one graph for all, with the length of a batch as a symbol.

    The first layer's input has to want a gradient as the others' does, or it is a graph of its own.
    """

    def __init__(self, model: Any) -> None:
        self._layers = decoder_layers(model)
        model.enable_input_require_grads()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Compiled at the first step."""
        for layer in self._layers:
            layer.compile(dynamic=True)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """What comes after is a few forwards, which are not worth a compilation of their own."""
        for layer in self._layers:
            layer._compiled_call_impl = None
