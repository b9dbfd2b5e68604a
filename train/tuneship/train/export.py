"""Write a trained adapter in the words that SGLang serves as trained: one rank, one alpha / r, targets by name.

Two files, `adapter_config.json` and `adapter_model.safetensors`, in the dtype that was trained. What SGLang would
misread is rewritten exactly: rsLoRA's alpha / sqrt(r) as the alpha under which alpha / r says the same, rank and alpha
patterns as one of each (`core/even.py`). What it has no words for (DoRA, embeddings) stays as PEFT writes it: merging
knows it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer

from tuneship.core import even, servable
from tuneship.core.servable import Layer

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"


def save_adapter(trained: PeftModel, folder: Path) -> dict[str, Any]:
    """Write the adapter into `folder`, and return its settings as they stand there."""
    # The embeddings of the base are in the base; "auto" would copy them where the head or the embedding has LoRA.
    trained.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # an empty model card
    config: dict[str, Any] = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    if not servable.needs_folding(config):
        return config
    layers = _layers(trained)
    folding = servable.fold(config, layers)
    if even.changes(folding, {name: layer.rank for name, layer in layers.items()}):
        raw = (folder / _WEIGHTS).read_bytes()
        if not even.is_pairs(raw):
            return config
        even.rewrite(raw, folding, folder / _WEIGHTS)
    (folder / _CONFIG).write_text(json.dumps(folding.config, indent=2, sort_keys=True), encoding="utf-8")
    return folding.config


def _layers(trained: PeftModel) -> dict[str, Layer]:
    """As they were trained; the saved settings have their patterns sorted, and PEFT takes the first that fits."""
    (name,) = trained.active_adapters
    return {
        module: Layer(layer.r[name], layer.scaling[name])
        for module, layer in trained.base_model.model.named_modules()
        if isinstance(layer, LoraLayer)
    }
