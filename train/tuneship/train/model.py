"""Load a base as it will be trained on or merged into, and attach LoRA adapters to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tuneship.core.artifact import Manifest, quantized_base
from tuneship.core.errors import ArtifactError
from tuneship.core.progress import say
from tuneship.core.recipe import Lora, Model, Quantization, Recipe

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_AMPERE = (8, 0)
_ATTENTION = ("flash_attention_2", "sdpa", "eager")
_NO_ATTENTION = ("flashattention", "flash_attn", "flash_attention", "scaled_dot_product_attention", "sdpa")
"""What transformers says when a model or a machine lacks one."""


def device() -> torch.device:
    """The first CUDA device, or the CPU."""
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def pick_dtype(wanted: str) -> torch.dtype:
    """`auto` is bf16 where the hardware computes in it, else fp16 on a GPU and fp32 on a CPU.

    `torch.cuda.is_bf16_supported()` also counts emulation, so the compute capability decides.
    """
    if wanted != "auto":
        return _DTYPES[wanted]
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.get_device_capability() >= _AMPERE else torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def load_base(path: Path, model: Model, quantization: Quantization | None = None) -> Any:
    """The base in eval mode on the first device; NF4 when `quantization` says so, 16- or 32-bit otherwise.

    A base that is packed on disk already is loaded as it is.

    Raises:
        ArtifactError: transformers cannot load it, it needs code of its own and `trust_remote_code` is off, or it is
            packed in another way than `quantization` says.

    """
    dtype = pick_dtype(model.dtype)
    packed = quantized_base(path)
    if packed:
        _check_packed(packed, path, quantization)
    packs = quantization and quantization.method != "none" and not packed
    given = {"quantization_config": _four_bits(quantization, dtype)} if quantization and packs else {}
    try:
        loaded = _with_attention(path, model, dtype=dtype, device_map={"": device()}, **given)
    except (ValueError, OSError) as error:
        raise ArtifactError(f"cannot load {model.id}: {str(error).splitlines()[0]}") from error
    loaded.config.use_cache = False
    return loaded.eval()


def _with_attention(path: Path, model: Model, **given: Any) -> Any:
    """In the best attention that loads, of what the recipe wants and what is slower."""
    order = _ATTENTION[_ATTENTION.index("sdpa" if model.attention == "auto" else model.attention) :]
    for attention, slower in zip(order, [*order[1:], ""], strict=True):
        try:
            return AutoModelForCausalLM.from_pretrained(
                path, attn_implementation=attention, trust_remote_code=model.trust_remote_code, **given
            )
        except (ImportError, ValueError) as error:
            if not slower or not any(word in str(error).lower() for word in _NO_ATTENTION):
                raise
            say(f"no {attention} for this model here ({str(error).splitlines()[0]}): using {slower}")
    raise AssertionError("the last one is returned or raised")


def _four_bits(quantization: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig:
    compute = quantization.compute_dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.method,
        bnb_4bit_use_double_quant=quantization.double,
        bnb_4bit_compute_dtype=dtype if compute == "auto" else _DTYPES[compute],
    )


def _check_packed(base: Manifest, path: Path, wanted: Quantization | None) -> None:
    double = base.quantization.double
    if base.kind == "base-dequantized":
        raise ArtifactError(
            f"{path.name} is for serving: its weights are NF4's values, not the model's",
            hint=f"use its original, {base.base.id}",
        )
    if wanted is None or wanted.method != "nf4":
        raise ArtifactError(f"{path.name} is NF4: it has no 16-bit weights", hint=f"use its original, {base.base.id}")
    if wanted.double != double:
        raise ArtifactError(
            f"{path.name} was written with quantization.double = {str(double).lower()}, the recipe has the opposite",
            hint=f"--quantization.double {str(double).lower()}, or build another base",
        )


def lora_config(lora: Lora, base: Any) -> LoraConfig:
    """PEFT's view of the recipe's `[lora]`, its targets listed by name."""
    modules = lora.target_modules
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        target_modules=linear_layers(base) if isinstance(modules, str) else list(modules),
        task_type="CAUSAL_LM",
    )


def linear_layers(base: Any) -> list[str]:
    """Names of the decoder's linear layers, such as `q_proj`; the LM head is none of them.

    PEFT's own "all-linear" expands to full paths, one a layer, which servers that read `target_modules` do not know.
    """
    head = base.get_output_embeddings()
    linear = (name for name, module in base.named_modules() if isinstance(module, nn.Linear) and module is not head)
    return sorted({name.rsplit(".", 1)[-1] for name in linear})


def load_trained(base_path: Path, adapter: Path, recipe: Recipe) -> PeftModel:
    """The model as it was trained: the quantized base with `adapter` on it, in eval mode."""
    base = load_base(base_path, recipe.model, recipe.quantization)
    return PeftModel.from_pretrained(base, adapter).eval()
