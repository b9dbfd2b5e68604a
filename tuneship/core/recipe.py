"""The recipe: everything a run needs to know, typed, frozen and checked once.

A recipe is hand-written TOML; only `model.id` and `data.train` have no default. Unknown keys are refused with the
nearest valid one, combinations that make no sense are refused naming both fields, and a value whose work is not done
yet is refused by name rather than ignored. `load` is the way in (`recipe_file.py`); nothing downstream checks again.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tuneship.core.recipe_bench import Bench
from tuneship.core.recipe_section import Count, Section, Share
from tuneship.core.recipe_train import Train
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
    """Branch, tag or commit of a hub model; a commit is what can be repeated."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """While training. auto: bfloat16 where the hardware computes in it, else float16 on a GPU, float32 on a CPU."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """What is not there falls back to sdpa, and that to eager, saying so."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model, while training and merging. The engine is not told to."""


class Quantization(Section):
    """Of the frozen base, while training."""

    method: Literal["nf4", "fp4", "none"] = "nf4"
    """nf4 and fp4: weights of 4 bits, for train.method = qlora; none: for lora and full."""
    double: bool = True
    """Quantize the blocks' scales too: 0.4 bits a weight less."""
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """In which packed weights are multiplied; auto: as model.dtype."""


class Data(Section):
    """What is learnt from and what is held out. Paths are relative to the recipe."""

    train: Annotated[str, Field(min_length=1)]
    """JSONL, JSON, CSV, Parquet or Arrow files (a path or a glob), a folder that `datasets` saved or can load, or
    `hub:owner/name`; `:split` after the last two.
    """
    heldout: str = ""
    """As `train`: rows that are never learnt, for parity, verify and the bench. Empty: none."""
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt-completion", "text"] = "auto"
    """auto: whichever of them a row has the columns of."""
    columns: dict[str, str] = Field(default_factory=dict)
    """{a column of the format: the one that stands for it in these rows}."""
    template: str = ""
    """A chat template for a model that has none: `alpaca`, `chatml`, `mistral`, a Jinja file, or Jinja itself."""
    max_length: Annotated[int, Field(ge=16)] = 1024
    """Tokens of the longest row; a longer one cannot be used, and is never cut."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """What becomes of a row that cannot be used: it ends the run, or is left out and counted."""
    loss: Literal["assistant", "completion", "all"] = "assistant"
    """Which tokens are learnt: of all assistant turns, of the last one, or all."""

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
    """Of the two factors of every adapted layer."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """The adapter's product is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs that are dropped while training."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank); the exported adapter says the same as plain LoRA's alpha."""
    dora: bool = False
    """Learn the magnitude of each output apart from its direction. Merged, not served as an adapter."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Which layers get an adapter: ends of their names; all-linear: every projection, not the head."""
    rank_pattern: dict[str, Count] = Field(default_factory=dict)
    """{end of a layer's name, a regular expression: its rank}. The first that fits counts."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """{end of a layer's name, a regular expression: its alpha}, as `rank_pattern`."""

    @property
    def largest_rank(self) -> int:
        """What a server must have room for."""
        return max(self.rank, *self.rank_pattern.values()) if self.rank_pattern else self.rank


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
    """Of the served weights and activations; auto: bfloat16, which every card that serves has."""
    quantization: Literal["none", "nf4", "dequantized", "fp8", "w4a16"] = "none"
    """Of the served base. nf4: written once, and bit for bit what adapters are trained on; dequantized: the values of
    that in 16 bits, for their memory at their speed; fp8: SGLang's, on a GPU."""
    host: str = "127.0.0.1"
    """Address of the door. Beyond loopback it needs an API key (`tuneship keys add`)."""
    port: Annotated[int, Field(ge=0, le=65535)] = 30000
    """0 takes a free one."""
    max_loras: Count = 8
    """Adapters in one batch; more than that take turns."""
    max_rank: Count = 64
    """Largest rank of an adapter."""
    context_length: Annotated[int, Field(ge=0)] = 0
    """Longest prompt and answer together, in tokens; 0: the model's own."""
    memory_fraction: Literal["auto"] | Share = "auto"
    """Share of GPU memory for weights and KV cache; auto: SGLang's choice."""
    verify: bool = True
    """Hold a version against what training measured before it answers anybody."""
    restarts: Annotated[int, Field(ge=0)] = 5
    """Of an engine that died or hangs, in a row; then the server ends."""
    hang_timeout_s: Annotated[float, Field(gt=0)] = 60
    """Requests wait and nothing comes for so long: then the engine is asked, and started again if it says nothing
    within as many seconds more, 20 at most."""
    drain_s: Annotated[float, Field(ge=0)] = 30
    """What is in flight when the server is told to end may take so long."""
    extra_args: tuple[str, ...] = ()
    """Handed to SGLang as they are; the last of a flag that is given twice counts. What would open the engine to
    others, write prompts down or serve something else is refused by name."""

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
    """Of the run's folder (`runs/NAME`), and what clients call the model. Without it: the file's name."""
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
