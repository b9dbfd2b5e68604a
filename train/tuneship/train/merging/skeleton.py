"""A base's model without its weights: what its tensors are called, which ones NF4 packs, whether the head is tied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers import AutoHfQuantizer

from tuneship.core.errors import ArtifactError
from tuneship.core.recipe import Model
from tuneship.train.merging.changes import Skeleton


def read(path: Path, model: Model) -> Skeleton:
    """Of the checkpoint at `path`, by transformers' own rules; nothing is allocated.

    Raises:
        ArtifactError: transformers does not know the model, or needs `trust_remote_code`.

    """
    built = build(path, model)
    names = {id(module): name for name, module in built.named_modules()}
    embedding, head = built.get_input_embeddings(), built.get_output_embeddings()
    return Skeleton(
        embedding=f"{names[id(embedding)]}.weight",
        head=f"{names[id(head)]}.weight",
        tied=head.weight is embedding.weight,
        packed=_packed(built),
    )


def build(path: Path, model: Model) -> Any:
    """The model itself, on the meta device.

    Raises:
        ArtifactError: transformers does not know the model, or needs `trust_remote_code`.

    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
    except (ValueError, OSError) as error:
        raise ArtifactError(f"cannot read {model.id}: {str(error).splitlines()[0]}") from error


def _packed(built: Any) -> frozenset[str]:
    """Keys of the weights that loading in 4 bits packs."""
    from bitsandbytes.nn import Linear4bit  # noqa: PLC0415 - seconds, where torch is there already

    quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    quantizer.preprocess_model(built, device_map=None)
    return frozenset(f"{name}.weight" for name, module in built.named_modules() if isinstance(module, Linear4bit))
