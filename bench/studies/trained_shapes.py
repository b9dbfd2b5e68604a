"""A base of Qwen2.5-1.5B's shape with random weights, rows of exactly so many tokens, and a recipe over both.

    python bench/studies/trained_shapes.py FOLDER           # FOLDER/{base, rows.jsonl, bench.toml}
    tuneship bench train FOLDER/bench.toml --train.micro_batch 32 --ways tuneship unsloth

No download, no meaning: right for speed and memory. The vocabulary is Qwen's, so that the LM head is as large; the
tokenizer is the bundled model's, whose ids fit into it.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from served_shapes import write_base

ROWS = 96
QWENS_VOCABULARY = 151936
RECIPE = """name = "speed"

[model]
id = "base"
dtype = "bfloat16"

[data]
train = "rows.jsonl"
max_length = {length}

[lora]
rank = 16
alpha = 32

[train]
effective_batch = 64
scheduler = "constant"
"""


def main() -> None:
    """Write all three."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--length", type=int, default=1024, help="tokens of each row")
    parser.add_argument("--tiny", action="store_true", help="a shape for a dry run")
    asked = parser.parse_args()
    write_base("tiny" if asked.tiny else "1.5b", asked.folder / "base", vocab=0 if asked.tiny else QWENS_VOCABULARY)
    _write_rows(asked.folder, asked.length)
    (asked.folder / "bench.toml").write_text(RECIPE.format(length=asked.length), encoding="utf-8")


def _write_rows(folder: Path, length: int) -> None:
    from transformers import AutoTokenizer  # noqa: PLC0415

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    words = [word for word in map(tokenizer.decode, range(1000, 20000)) if word[0] == " " and _is_plain(word[1:])]
    draw = random.Random(0)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(ROWS):
            chat = _of_length(tokenizer, [draw.choice(words) for _ in range(length)], length)
            file.write(json.dumps({"messages": chat}) + "\n")


def _is_plain(word: str) -> bool:
    return word.isascii() and word.isalpha() and word.islower()


def _of_length(tokenizer: Any, words: list[str], length: int) -> list[dict[str, str]]:
    """A short question, and as many of `words` as make it `length` tokens."""

    def chat(count: int) -> list[dict[str, str]]:
        answer = "".join(words[:count]).strip()
        return [{"role": "user", "content": "go on"}, {"role": "assistant", "content": answer}]

    def missing(count: int) -> int:
        text = tokenizer.apply_chat_template(chat(count), tokenize=False)
        return length - len(tokenizer(text, add_special_tokens=False)["input_ids"])

    count = length - 64
    for _ in range(length):
        short = missing(count)
        if short == 0:
            return chat(count)
        count += short if short > 0 else -1
    raise RuntimeError(f"no answer of these words makes a row of {length} tokens")


if __name__ == "__main__":
    main()
