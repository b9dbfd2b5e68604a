"""TRL's `SFTTrainer`, with rows in an order of their own and steps that are cut smaller when memory runs out."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from trl import SFTTrainer

from tuneship.core.progress import say
from tuneship.core.shape import Shape
from tuneship.train.fitting import metrics, pieces
from tuneship.train.fitting.order import Order
from tuneship.train.fitting.pieces import Batch
from tuneship.train.fitting.tracking import Meter


class Trainer(SFTTrainer):
    """A step learns from the same rows however it is cut.

    Args:
        order: of the rows.
        at_most: rows at a time, when fewer than the arguments say; 0: as they say.
        given: everything that TRL takes.

    """

    def __init__(self, order: Order, at_most: int = 0, **given: Any) -> None:
        self._order = order
        self._at_most = at_most
        self._done: list[Batch] = []
        self.accumulation = 0
        """Pieces of the last step."""
        self.tokens: Tensor | int = 0
        """Of this step, without padding."""
        self.heldout_nll: float | None = None
        """Measured after this step."""
        super().__init__(**given)
        frozen = any(not value.requires_grad for value in self.model.parameters())
        self._meter = Meter(Shape.of(self.model.config.to_dict()), frozen=frozen)

    @property
    def micro_batch(self) -> int:
        """Rows that are computed at a time."""
        return self._at_most or int(self.args.per_device_train_batch_size)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None: a checkpoint is nothing to publish."""

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Everybody who is told about a step is told this too."""
        if "loss" in logs:
            measured = self._meter.lap(int(self.tokens)) | {metrics.HELDOUT_NLL: self.heldout_nll}
            logs |= {key: value for key, value in measured.items() if value is not None}
        super().log(logs, start_time)
        self._meter.start()

    def _load_from_checkpoint(self, *given: Any, **more: Any) -> None:
        """PEFT loads adapters in float32; they go on in the dtype in which they were trained."""
        dtypes = {name: value.dtype for name, value in self.model.named_parameters() if value.requires_grad}
        super()._load_from_checkpoint(*given, **more)
        for name, value in self.model.named_parameters():
            if name in dtypes:
                value.data = value.data.to(dtypes[name])

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:  # noqa: ARG002 - the library's signature
        return self._order

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Any]:
        """The next step's batches, and how many of their tokens carry loss."""
        batches, loss_tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        assert loss_tokens is not None, "losses of batches of unequal length would be averaged wrongly"
        self._done, self.accumulation = [], 0
        self.tokens, self.heldout_nll = sum(pieces.tokens_in(batch) for batch in batches), None
        return batches, loss_tokens

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        """One batch, forward and backward. Out of memory: the whole step so far again, in pieces of half the size.

        Raises:
            torch.OutOfMemoryError: a single row is too much.

        """
        loss = self._tried(model, [inputs], num_items_in_batch)
        while loss is None:
            loss = self._tried(model, [*self._cut_smaller(model, inputs), inputs], num_items_in_batch)
        self._done.append(inputs)
        return loss

    def _tried(self, model: Any, batches: list[Batch], loss_tokens: Any) -> Tensor | None:
        """The loss of the last of `batches`; None when memory ran out, with nothing of the attempt kept alive."""
        try:
            for batch in batches:
                losses = []
                for piece in pieces.cut(batch, self._at_most):
                    losses.append(super().training_step(model, piece, loss_tokens))
                    self.accumulation += 1
        except torch.OutOfMemoryError:
            if self.micro_batch == 1:
                raise
            return None
        return torch.stack(losses).sum()

    def _cut_smaller(self, model: Any, inputs: Batch) -> list[Batch]:
        """Halve the pieces, and name what of this step must be done again: a torn backward spoils its gradients."""
        size = min(self._at_most or pieces.rows_in(inputs), pieces.rows_in(inputs))
        self._at_most = -(-size // 2)
        self.accumulation = 0
        say(f"out of memory at step {self.state.global_step + 1}: again with {self._at_most} rows at a time")
        model.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()
        return self._done
