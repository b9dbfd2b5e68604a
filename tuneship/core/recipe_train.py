"""The part of a recipe that says how it is trained: [train]."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from tuneship.core.recipe_section import Count, Section


class Train(Section):
    """The optimisation."""

    not_yet: ClassVar = {
        "strategy": ("ddp", "fsdp2"),
    }

    method: Literal["qlora", "lora", "full"] = "qlora"
    """qlora: an adapter on a 4-bit base; lora: on a 16-bit one; full: all weights, without an adapter."""
    backend: Literal["trl", "unsloth"] = "trl"
    """unsloth: on a CUDA device, in an environment of its own; no checkpoints, and no watch over the loss."""
    effective_batch: Count = 16
    """Rows of one optimiser step."""
    micro_batch: Literal["auto"] | Count = "auto"
    """Rows that are computed at a time; it must divide `effective_batch`. auto: planned by memory."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Times that all rows are seen, where `steps` is 0."""
    steps: Annotated[int, Field(ge=0)] = 0
    """Optimiser steps; 0 means: as many as `epochs` takes."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """The highest, after the warm-up."""
    scheduler: Literal[
        "cosine",
        "linear",
        "constant",
        "constant_with_warmup",
        "polynomial",
        "inverse_sqrt",
    ] = "cosine"
    """How the learning rate goes on after the warm-up, which `constant` has none of."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the steps in which the learning rate rises from 0."""
    optimizer: Literal["paged_adamw_8bit", "adamw_8bit", "paged_adamw", "adamw"] = "paged_adamw_8bit"
    """Paged: its state moves to host memory when the GPU's runs out. Without 8bit: moments in 32 bits."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 0.3
    """Gradients are scaled down to this norm."""
    group_by_length: bool = False
    """Put rows of like length into one step: less padding, another order."""
    checkpointing: Literal["auto"] | bool = "auto"
    """Compute activations again in the backward pass, to save memory; auto: in as many layers as it needs."""
    kernels: Literal["auto", "peft", "fused"] = "auto"
    """What LoRA layers compute with: PEFT's own code, or functions with fewer passes over memory; auto: those on a GPU.
    DoRA, dropout and whatever else is not plain LoRA is PEFT's in any case."""
    compile: bool = False
    """`torch.compile` of each decoder layer, in place of Liger's kernels; takes a while at the start."""
    packing: bool | Literal["bfd", "wrapped"] = False
    """Several rows in one of data.max_length, whole and unseen by each other (true: bfd). Batches then count those."""
    liger: Literal["auto"] | bool = "auto"
    """Liger's kernels beside PEFT's code, on a GPU; auto: where they are installed."""
    strategy: Literal["single", "ddp", "fsdp2"] = "single"
    """How a model is spread over devices."""
    seed: int = 0
    """Of the order of rows, the adapter's first values and dropout."""
    save_steps: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"
    """Steps between checkpoints while training; auto: ten minutes. 0: none but at SIGTERM."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """The last ones, until the adapter is there; the newest may be half-written when a kill comes."""
    eval_steps: Annotated[int, Field(ge=0)] = 0
    """Steps between measurements of the held-out NLL, of which the best adapter is kept. 0: none."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Measurements in a row without a better one that end training early. 0: it goes on to its last step."""
    report_to: tuple[Literal["trackio", "tensorboard", "wandb"], ...] = ()
    """Who is told every step's figures, beside metrics.jsonl. Each is a package of its own."""
    spike: Annotated[float, Field(ge=0)] = 3.0
    """Nats by which the loss may stand over its recent median; twice in a row ends the run. 0: never."""

    @model_validator(mode="after")
    def _micro_batch_divides_effective_batch(self) -> Train:
        if self.micro_batch != "auto" and self.effective_batch % self.micro_batch:
            raise ValueError(
                f"micro_batch = {self.micro_batch} does not divide effective_batch = {self.effective_batch}"
            )
        return self

    @model_validator(mode="after")
    def _rows_stay_whole(self) -> Train:
        if self.packing == "wrapped":
            raise ValueError("packing = 'wrapped' cuts rows and lets them see each other: packing = 'bfd' does neither")
        if self.packs and self.group_by_length:
            raise ValueError("group_by_length = true has nothing to group where packing fills all rows")
        return self

    @model_validator(mode="after")
    def _compiler_can_read_it(self) -> Train:
        if self.compile and self.liger is True:
            raise ValueError("compile = true does not go with liger = true, whose kernels torch.compile cannot trace")
        return self

    @model_validator(mode="after")
    def _unsloth_does_it(self) -> Train:
        beyond = {
            "packing": self.packs,
            "eval_steps": self.eval_steps,
            "report_to": self.report_to,
            "group_by_length": self.group_by_length,
            "compile": self.compile,
            "kernels = 'fused'": self.kernels == "fused",
            "optimizer = 'paged_adamw'": self.optimizer == "paged_adamw",
            "save_steps": self.save_steps not in ("auto", 0),
        }
        named = [key for key, value in beyond.items() if value]
        if self.backend == "unsloth" and named:
            raise ValueError(f"backend = 'unsloth' does not go with {named[0]}")
        return self

    @property
    def packs(self) -> bool:
        """Whether rows are packed."""
        return self.packing is not False
