"""The recipe: everything a run needs to know, typed, frozen and checked once.

A recipe is hand-written TOML; only `model.id` and `data.train` have no default. Unknown keys are refused with the
nearest valid one, combinations that make no sense are refused naming both fields, and a value whose work is not done
yet is refused by name rather than ignored. `load` is the way in (`recipe_file.py`); nothing downstream checks again.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from tuneship.core.recipe_bench import Bench
from tuneship.core.recipe_section import Count, Section, Share
from tuneship.core.servable import PROJECTIONS, unserved_modules

BUNDLED_PREFIX = "bundled:"

FORMAT_COLUMNS = {
    "messages": ("messages", "tools"),
    "sharegpt": ("conversations", "system", "tools"),
    "alpaca": ("instruction", "input", "output", "response", "system", "history"),
    "prompt-completion": ("prompt", "completion", "tools"),
    "text": ("text",),
}
"""{data.format: the columns that it knows}, in the order in which `auto` looks for them."""

TABLES = (".csv", ".tsv", ".parquet", ".arrow")
"""Endings of files of rows that are no JSON."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]


class Model(Section):
    """The base model and how it is loaded."""

    id: Annotated[str, Field(min_length=1)]
    """Hub id, local path, or `bundled:smollm2-135m-instruct`."""
    revision: str = "main"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """What is not there falls back to sdpa, and that to eager, saying so."""
    trust_remote_code: bool = False


class Quantization(Section):
    """Of the frozen base, while training."""

    method: Literal["nf4", "fp4", "none"] = "nf4"
    double: bool = True
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"


class Data(Section):
    """What is learnt from and what is held out. Paths are relative to the recipe."""

    train: Annotated[str, Field(min_length=1)]
    """JSONL, JSON, CSV, Parquet or Arrow files (a path or a glob), a folder that `datasets` saved or can load, or
    `hub:owner/name`; `:split` after the last two.
    """
    heldout: str = ""
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt-completion", "text"] = "auto"
    """auto: whichever of them a row has the columns of."""
    columns: dict[str, str] = Field(default_factory=dict)
    """{a column of the format: the one that stands for it in these rows}."""
    template: str = ""
    """A chat template for a model that has none: `alpaca`, `chatml`, `mistral`, a Jinja file, or Jinja itself."""
    max_length: Annotated[int, Field(ge=16)] = 1024
    on_bad_row: Literal["fail", "skip"] = "fail"
    loss: Literal["assistant", "completion", "all"] = "assistant"

    @model_validator(mode="after")
    def _columns_are_of_the_format(self) -> Data:
        formats = FORMAT_COLUMNS if self.format == "auto" else {self.format: FORMAT_COLUMNS[self.format]}
        if any(self.columns.keys() <= set(columns) for columns in formats.values()):
            return self
        known = "; ".join(f"{name}: {', '.join(columns)}" for name, columns in formats.items())
        given = ", ".join(self.columns)
        raise ValueError(f"columns names {given}, which no one format has ({known})")


class Lora(Section):
    """The adapter's shape."""

    rank: Count = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    rslora: bool = False
    """Scale by alpha / sqrt(rank); the exported adapter says the same as plain LoRA's alpha."""
    dora: bool = False
    """Learn the magnitude of each output apart from its direction. Merged, not served as an adapter."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    rank_pattern: dict[str, Count] = Field(default_factory=dict)
    """{end of a layer's name, a regular expression: its rank}. The first that fits counts."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)

    @property
    def largest_rank(self) -> int:
        """What a server must have room for."""
        return max(self.rank, *self.rank_pattern.values()) if self.rank_pattern else self.rank


class Train(Section):
    """The optimisation."""

    not_yet: ClassVar = {
        "strategy": ("ddp", "fsdp2"),
    }

    method: Literal["qlora", "lora", "full"] = "qlora"
    backend: Literal["trl", "unsloth"] = "trl"
    """unsloth: on a CUDA device, in an environment of its own; no checkpoints, and no watch over the loss."""
    effective_batch: Count = 16
    micro_batch: Literal["auto"] | Count = "auto"
    epochs: Annotated[float, Field(gt=0)] = 1.0
    steps: Annotated[int, Field(ge=0)] = 0
    """Optimiser steps; 0 means: as many as `epochs` takes."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    scheduler: Literal[
        "cosine",
        "linear",
        "constant",
        "constant_with_warmup",
        "cosine_with_restarts",
        "polynomial",
        "inverse_sqrt",
    ] = "cosine"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    optimizer: Literal["paged_adamw_8bit", "adamw_8bit", "paged_adamw", "adamw"] = "paged_adamw_8bit"
    """Paged: its state moves to host memory when the GPU's runs out. Without 8bit: moments in 32 bits."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 0.3
    group_by_length: bool = False
    checkpointing: Literal["auto"] | bool = "auto"
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
    seed: int = 0
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


class Merge(Section):
    """From adapter to one checkpoint."""

    base: Literal["original", "dequantized", "auto"] = "auto"
    """Merge into the 16-bit weights, or into what packing made of them while training. auto: where the model fits in
    memory twice, whichever is better on held-out rows; else the original.
    """
    max_nll_increase: Annotated[float, Field(ge=0)] = 0.02
    """Nats per token, one-sided: the merged model may be better than the trained one without limit."""
    quantize: Literal["none", "fp8", "w4a16"] = "none"
    """What is merged once more in fewer bits, by llm-compressor, and held to the same limit. Served on a GPU."""


class Serve(Section):
    """The server. `memory_fraction` is SGLang's `--mem-fraction-static`."""

    mode: Literal["merged", "adapters", "auto"] = "merged"
    """auto, before training: merged where 16-bit weights and a usable KV cache fit, else adapters on the NF4 base."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    quantization: Literal["none", "nf4", "dequantized", "fp8", "w4a16"] = "none"
    """Of the served base. nf4: written once, and bit for bit what adapters are trained on; dequantized: the values of
    that in 16 bits, for their memory at their speed; fp8: SGLang's, on a GPU."""
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 30000
    """0 takes a free one."""
    max_loras: Count = 8
    max_rank: Count = 64
    context_length: Annotated[int, Field(ge=0)] = 0
    memory_fraction: Literal["auto"] | Share = "auto"
    verify: bool = True
    """Hold a version against what training measured before it answers anybody."""
    restarts: Annotated[int, Field(ge=0)] = 5
    """Of an engine that died or hangs, in a row; then the server ends."""
    hang_timeout_s: Annotated[float, Field(gt=0)] = 60
    """Requests wait and nothing comes for so long: then the engine is asked, and started again if it says nothing."""
    drain_s: Annotated[float, Field(ge=0)] = 30
    """What is in flight when the server is told to end may take so long."""
    extra_args: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _quantization_is_there_to_be_made(self) -> Serve:
        if self.quantization == "w4a16":
            raise ValueError(
                "quantization = 'w4a16': no W4A16 weights are made here; a checkpoint that has them already "
                "(compressed-tensors) is served as it is, on a GPU, with quantization = 'none'"
            )
        if self.mode == "auto" and self.quantization != "none":
            raise ValueError(f"mode = 'auto' chooses the quantization too: not {self.quantization!r}")
        return self


class Recipe(Section):
    """The whole of it."""

    name: Name = "run"
    model: Model
    quantization: Quantization = Quantization()
    data: Data
    lora: Lora = Lora()
    train: Train = Train()
    merge: Merge = Merge()
    serve: Serve = Serve()
    bench: Bench = Bench()

    @model_validator(mode="after")
    def _method_and_quantization_agree(self) -> Recipe:
        wanted = ("nf4", "fp4") if self.train.method == "qlora" else ("none",)
        if self.quantization.method not in wanted:
            raise ValueError(
                f"train.method = {self.train.method!r} needs quantization.method = {wanted[0]!r}, "
                f"not {self.quantization.method!r}"
            )
        return self

    @model_validator(mode="after")
    def _unsloth_trains_plain_lora_on_nf4(self) -> Recipe:
        if self.train.backend != "unsloth":
            return self
        beyond = {
            "lora.dora": self.lora.dora,
            "lora.rank_pattern": self.lora.rank_pattern,
            "lora.alpha_pattern": self.lora.alpha_pattern,
            "quantization.method = 'fp4'": self.quantization.method == "fp4",
            "quantization.method = 'none'": self.quantization.method == "none",
        }
        named = [key for key, value in beyond.items() if value]
        if named:
            raise ValueError(f"train.backend = 'unsloth' does not go with {named[0]}")
        return self

    @model_validator(mode="after")
    def _full_training_makes_a_checkpoint(self) -> Recipe:
        if self.train.method != "full":
            return self
        beyond = {
            "serve.mode": self.serve.mode == "adapters",
            "merge.quantize": self.merge.quantize != "none",
            "train.kernels": self.train.kernels == "fused",
            "train.backend": self.train.backend != "trl",
        }
        named = [key for key, given in beyond.items() if given]
        if named:
            section, _, key = named[0].partition(".")
            value = getattr(getattr(self, section), key)
            raise ValueError(f"{named[0]} = {value!r} does not go with train.method = 'full', which makes no adapter")
        return self

    @model_validator(mode="after")
    def _held_out_rows_are_there_to_be_measured(self) -> Recipe:
        if self.train.patience and not self.train.eval_steps:
            raise ValueError(f"train.patience = {self.train.patience} needs train.eval_steps above 0")
        if self.train.eval_steps and not self.data.heldout:
            raise ValueError(f"train.eval_steps = {self.train.eval_steps} needs data.heldout")
        return self

    @model_validator(mode="after")
    def _tasks_have_chats(self) -> Recipe:
        for task in self.bench.eval:
            if task.data.endswith(TABLES) and task.data != self.data.heldout:
                raise ValueError(f"bench.eval.data = {task.data!r}: a JSONL of messages, or what data.heldout names")
        return self

    @model_validator(mode="after")
    def _only_what_was_packed_is_dequantized(self) -> Recipe:
        if self.merge.base == "dequantized" and self.quantization.method == "none":
            raise ValueError("merge.base = 'dequantized' needs quantization.method = 'nf4', not 'none'")
        return self

    @model_validator(mode="after")
    def _quantized_once(self) -> Recipe:
        if self.merge.quantize != "none" and self.serve.quantization != "none":
            raise ValueError(
                f"merge.quantize = {self.merge.quantize!r} needs serve.quantization = 'none', "
                f"not {self.serve.quantization!r}"
            )
        return self

    @model_validator(mode="after")
    def _merged_is_served_as_it_was_proven(self) -> Recipe:
        if self.serve.mode == "merged" and self.serve.quantization in {"nf4", "dequantized"}:
            raise ValueError(
                f"serve.quantization = {self.serve.quantization!r} needs serve.mode = 'adapters': a merged model is "
                "proven in 16 bits, of its own values"
            )
        return self

    @model_validator(mode="after")
    def _dequantized_is_what_was_packed(self) -> Recipe:
        if self.serve.quantization == "dequantized" and self.quantization.method != "nf4":
            raise ValueError(
                "serve.quantization = 'dequantized' serves the values of NF4, and quantization.method = "
                f"{self.quantization.method!r} trains on others"
            )
        return self

    @model_validator(mode="after")
    def _adapter_fits_the_server(self) -> Recipe:
        if self.serve.mode != "adapters":
            return self
        if self.lora.largest_rank > self.serve.max_rank:
            raise ValueError(f"lora.rank = {self.lora.largest_rank} is over serve.max_rank = {self.serve.max_rank}")
        if self.lora.dora:
            raise ValueError("lora.dora = true does not go with serve.mode = 'adapters': SGLang has no DoRA")
        if self.serve.quantization == "nf4" and self.quantization.method == "fp4":
            raise ValueError(
                "serve.quantization = 'nf4' serves another base than quantization.method = 'fp4' trains on"
            )
        modules = PROJECTIONS if self.lora.target_modules == "all-linear" else self.lora.target_modules
        for reason in unserved_modules(name.rpartition(".")[2] for name in modules):
            raise ValueError(f"lora.target_modules does not go with serve.mode = 'adapters': it {reason.fact}")
        return self
