"""A stand-in for the checkout and its bundled model, in which the pages' commands take seconds instead of minutes.

    standin = build(Path("recipes"), Path("/tmp/walk"))
    standin.folder       # recipes/ under their own names: fewer rows, another number of steps, short measurements
    standin.environment  # where tuneship finds a tiny model under the name of the one that comes with it

The model has two layers and a tokenizer that was made from the rows, so that it can learn them.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w

from tuneship.core import model_source
from tuneship.core.cache import cache_dir

RECIPES = ("quickstart", "triage", "sql")
TRAIN_ROWS, HELDOUT_ROWS = 64, 16
CHANGED: Mapping[str, Mapping[str, Any]] = {
    "train": {"steps": 40, "learning_rate": 1e-2, "optimizer": "adamw", "effective_batch": 4},
    # Random weights lose much in four bits; what is refused, and why, has tests of its own.
    "merge": {"max_nll_increase": 2.0},
}
LOAD = {"rates": [4], "duration_s": 2, "input_tokens": 16, "output_tokens": 8}
EVAL = {"limit": 8, "max_tokens": 24}
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class StandIn(NamedTuple):
    """A folder to run commands in, and what their environment must hold."""

    folder: Path
    environment: dict[str, str]


def build(recipes: Path, at: Path) -> StandIn:
    """Write recipes and rows like those of `recipes` under `at`, and a cache with a tiny model as the bundled one."""
    folder, cache = at / "checkout", at / "cache"
    (folder / "recipes" / "data").mkdir(parents=True)
    texts: list[str] = []
    for name in RECIPES:
        recipe = tomllib.loads((recipes / f"{name}.toml").read_text(encoding="utf-8"))
        for split, count in (("train", TRAIN_ROWS), ("heldout", HELDOUT_ROWS)):
            rows = (recipes / recipe["data"][split]).read_text(encoding="utf-8").splitlines(keepends=True)
            (folder / "recipes" / recipe["data"][split]).write_text("".join(rows[:count]), encoding="utf-8")
            texts += rows
        (folder / "recipes" / f"{name}.toml").write_text(tomli_w.dumps(_quick(recipe)), encoding="utf-8")
    model = cache / "models" / model_source.bundled_path().name
    write_model(model, texts)
    _share_bytecode(cache)
    return StandIn(folder, {"TUNESHIP_CACHE": str(cache)})


def _quick(recipe: dict[str, Any]) -> dict[str, Any]:
    for section, values in CHANGED.items():
        recipe[section] = recipe.get(section, {}) | values
    recipe["bench"]["load"] |= LOAD
    recipe["bench"]["eval"] = [task | EVAL for task in recipe["bench"]["eval"]]
    return recipe


def write_model(path: Path, texts: list[str]) -> None:
    """Write a Llama of two layers with random weights, in the 16 bits in which models are published."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer(texts)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,  # bitsandbytes packs 4-bit weights in blocks of 64
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.2,  # at the usual 0.02 a random model ignores its prompt
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
        dtype="bfloat16",
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def _tokenizer(texts: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_lines(texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )


def _lines(texts: list[str]) -> Iterator[str]:
    yield "system\nuser\nassistant\n"
    yield from texts


def _share_bytecode(cache: Path) -> None:
    """SGLang's compiled modules, which take a minute to make, are those of the user."""
    bytecode = cache_dir() / "bytecode"
    bytecode.mkdir(exist_ok=True)
    (cache / "bytecode").symlink_to(bytecode)
