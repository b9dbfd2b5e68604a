"""The recipe: everything a run needs to know, typed, frozen and checked once.

A recipe is hand-written TOML; only `model.id` and `data.train` have no default. Unknown keys are refused with the
nearest valid one, combinations that make no sense are refused naming both fields, and a value whose work is not done
yet is refused by name rather than ignored. `load` is the way in (`recipe_file.py`); nothing downstream checks again.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

BUNDLED_PREFIX = "bundled:"

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]


class Section(BaseModel):
    """One table of the recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    # Values that the contract names and this release cannot do yet: {key: refused values}.
    not_yet: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="after")
    def _refuse_what_is_not_done(self) -> Section:
        for key, refused in self.not_yet.items():
            value = getattr(self, key)
            if value in refused:
                raise ValueError(f"{key} = {value!r} is not yet supported")
        return self


class Model(Section):
    """The base model and how it is loaded."""

    id: Annotated[str, Field(min_length=1)]
    """Hub id, local path, or `bundled:smollm2-135m-instruct`."""
    revision: str = "main"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    trust_remote_code: bool = False


class Quantization(Section):
    """Of the frozen base, while training."""

    method: Literal["nf4", "none"] = "nf4"
    double: bool = True
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"


class Data(Section):
    """What is learnt from and what is held out. Paths are relative to the recipe."""

    not_yet: ClassVar = {"format": ("sharegpt", "alpaca", "text")}

    train: Annotated[str, Field(min_length=1)]
    heldout: str = ""
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt-completion", "text"] = "auto"
    columns: dict[str, str] = {}
    template: str = ""
    max_length: Annotated[int, Field(ge=16)] = 1024
    on_bad_row: Literal["fail", "skip"] = "fail"
    loss: Literal["assistant", "completion", "all"] = "assistant"

    @model_validator(mode="after")
    def _refuse_own_columns_and_templates(self) -> Data:
        for key in ("columns", "template"):
            if getattr(self, key):
                raise ValueError(f"{key} is not yet supported")
        return self


class Lora(Section):
    """The adapter's shape."""

    not_yet: ClassVar = {"rslora": (True,)}

    rank: Count = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    rslora: bool = False
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"


class Train(Section):
    """The optimisation."""

    not_yet: ClassVar = {
        "method": ("full",),
        "backend": ("unsloth",),
        "strategy": ("ddp", "fsdp2"),
        "packing": (True,),
    }

    method: Literal["qlora", "lora", "full"] = "qlora"
    backend: Literal["trl", "unsloth"] = "trl"
    effective_batch: Count = 16
    micro_batch: Literal["auto"] | Count = "auto"
    epochs: Annotated[float, Field(gt=0)] = 1.0
    steps: Annotated[int, Field(ge=0)] = 0
    """Optimiser steps; 0 means: as many as `epochs` takes."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    optimizer: Literal["paged_adamw_8bit", "adamw_8bit", "adamw"] = "paged_adamw_8bit"
    max_grad_norm: Annotated[float, Field(gt=0)] = 0.3
    group_by_length: bool = False
    checkpointing: Literal["auto"] | bool = "auto"
    packing: bool = False
    strategy: Literal["single", "ddp", "fsdp2"] = "single"
    seed: int = 0

    @model_validator(mode="after")
    def _micro_batch_divides_effective_batch(self) -> Train:
        if self.micro_batch != "auto" and self.effective_batch % self.micro_batch:
            raise ValueError(
                f"micro_batch = {self.micro_batch} does not divide effective_batch = {self.effective_batch}"
            )
        return self


class Merge(Section):
    """From adapter to one checkpoint."""

    not_yet: ClassVar = {"base": ("dequantized",)}

    base: Literal["original", "dequantized", "auto"] = "auto"
    max_nll_increase: Annotated[float, Field(ge=0)] = 0.02
    """Nats per token, one-sided: the merged model may be better than the trained one without limit."""


class Serve(Section):
    """The server. `memory_fraction` is SGLang's `--mem-fraction-static`."""

    not_yet: ClassVar = {"mode": ("auto",), "quantization": ("nf4", "fp8", "w4a16")}

    mode: Literal["merged", "adapters", "auto"] = "merged"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    quantization: Literal["none", "nf4", "fp8", "w4a16"] = "none"
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 30000
    """0 takes a free one."""
    max_loras: Count = 8
    max_rank: Count = 64
    context_length: Annotated[int, Field(ge=0)] = 0
    memory_fraction: Literal["auto"] | Share = "auto"
    extra_args: tuple[str, ...] = ()


class BenchLoad(Section):
    """An open-loop load: Poisson arrivals at each of `rates`."""

    not_yet: ClassVar = {"rates": ("sweep",)}

    rates: Literal["sweep"] | tuple[Annotated[float, Field(gt=0)], ...] = (1, 4, 16)
    duration_s: Annotated[float, Field(gt=0)] = 30
    input_tokens: Count = 128
    output_tokens: Count = 64


class BenchEval(Section):
    """One quality task: a scorer over rows whose last message is the reference answer."""

    task: Literal["exact", "json-fields", "sql"]
    data: Annotated[str, Field(min_length=1)]
    limit: Count = 200
    max_tokens: Count = 128

    @model_validator(mode="before")
    @classmethod
    def _refuse_lm_eval(cls, value: Any) -> Any:
        if isinstance(value, dict) and str(value.get("task", "")).startswith("lm-eval:"):
            raise ValueError(f"task = {value['task']!r} is not yet supported")
        return value


class BenchGate(Section):
    """What counts as a regression. Margins are ratios against the baseline."""

    latency_margin: Share = 0.05
    quality_margin: Share = 0.02
    alpha: Share = 0.05


class Bench(Section):
    """What is measured once the model is served."""

    load: BenchLoad = BenchLoad()
    eval: tuple[BenchEval, ...] = ()
    gate: BenchGate = BenchGate()


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
        wanted = {"qlora": "nf4", "lora": "none"}.get(self.train.method)
        if wanted and self.quantization.method != wanted:
            raise ValueError(
                f"train.method = {self.train.method!r} needs quantization.method = {wanted!r}, "
                f"not {self.quantization.method!r}"
            )
        return self

    @model_validator(mode="after")
    def _adapter_fits_the_server(self) -> Recipe:
        if self.serve.mode == "adapters" and self.lora.rank > self.serve.max_rank:
            raise ValueError(f"lora.rank = {self.lora.rank} is over serve.max_rank = {self.serve.max_rank}")
        return self
