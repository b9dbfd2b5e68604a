"""What is asked: words without meaning of a chosen length, or conversations from a file.

    prompts = source("shared-prefix", input_tokens=512, prefix_tokens=384, salt="a1b2")
    prompts.make("level 4/s", index=0)

A made-up prompt is a row of common English words, which most tokenizers turn into one token each; the token counts of a
result are the server's own. `salt` changes only the first words: two runs with the same seed send the same lengths, but
the second is not answered from the server's prefix cache. What requests of one run share, they still share.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tuneship.core.errors import DataError

_SALT_WORDS = 4

_TEXT = """
    about above across action after again against age ago agree air all allow almost alone along already also always
    among amount animal answer any appear apple area arm around arrive art ask away back bad ball bank base be bear
    beat because become bed before begin behind believe below best better between big bird black blood blue board
    boat body book both bottom box boy branch bread break bright bring brother brown build burn busy but buy by call
    camp can car care carry case catch cause center chance change check child choose church circle city claim class
    clean clear climb close cloth cloud cold color come common company complete condition consider contain continue
    control cook cool copy corn corner correct cost count country course cover cross crowd cry current cut dance
    dark day dead deal decide deep describe desert design develop differ direct discuss distant divide doctor dog
    dollar door down draw dream dress drink drive drop dry during each ear early earth east easy eat edge effect
    egg eight either electric else end energy engine enough enter equal even evening event every exact example
    except excite exercise expect experience eye face fact fair fall family famous far farm fast father favor fear
    feed feel few field fight figure fill final find fine finger finish fire first fish fit five flat floor flow
    flower fly follow food foot for force forest form forward four free fresh friend from front fruit full fun game
    garden gas gather general gentle get girl give glad glass go gold good govern grand grass gray great green
"""
_WORDS = tuple(_TEXT.split())

Messages = list[dict[str, Any]]
"""A chat: {"role": ..., "content": ...}."""


class Prompts(NamedTuple):
    """A source of prompts."""

    name: str
    """As a report names the workload."""
    make: Callable[[str, int, int], Messages]
    """(level, index, words) -> messages; the same for the same seed, but for the salted words."""
    ignore_eos: bool
    """Whether answers are forced to their length: only where the prompt means nothing."""


def source(
    workload: str,
    *,
    input_tokens: int,
    output_tokens: int,
    prefix_tokens: int = 0,
    heldout: str = "",
    seed: int = 0,
    salt: str = "",
) -> Prompts:
    """Where the prompts of `workload` come from.

    Args:
        workload: `fixed`, `shared-prefix`, `heldout`, or a JSONL of {"prompt"} or {"messages"}.
        input_tokens: words of a made-up prompt; the chat template comes on top.
        output_tokens: asked for; part of the name.
        prefix_tokens: of `input_tokens`, the same in all prompts of a level.
        heldout: the file that `heldout` stands for.
        seed: of the words.
        salt: see above.

    Raises:
        DataError: no file, or a line that cannot be asked; names file and line.

    """
    if workload == "fixed":
        return Prompts(
            f"fixed {input_tokens} in, {output_tokens} out",
            lambda level, index, words: ask(make_prompt(words, f"{seed} {level} {index}", salt)),
            ignore_eos=True,
        )
    if workload == "shared-prefix":
        return Prompts(
            f"shared-prefix {prefix_tokens} of {input_tokens} in, {output_tokens} out",
            lambda level, index, words: ask(_with_prefix(words, prefix_tokens, seed, level, index, salt)),
            ignore_eos=True,
        )
    file = heldout if workload == "heldout" else workload
    if not file:
        raise DataError("workload = 'heldout' has no file", hint="name the recipe's data.heldout, or a JSONL")
    rows = [conversation(row, where) for where, row in read_lines(Path(file))]
    return Prompts(
        f"{workload if workload == 'heldout' else Path(file).stem}, at most {output_tokens} out",
        lambda level, index, _words: _salted(rows[index % len(rows)], f"{level} {index // len(rows)}", salt),
        ignore_eos=False,
    )


def ask(text: str) -> Messages:
    """A chat of one question."""
    return [{"role": "user", "content": text}]


def make_prompt(words: int, seed: str, salt: str = "") -> str:
    """A row of `words` common words."""
    salted = min(_SALT_WORDS, words) if salt else 0
    head = random.Random(f"{salt} {seed}").choices(_WORDS, k=salted)
    body = random.Random(f"prompt {seed}").choices(_WORDS, k=words)
    return " ".join(head + body[salted:])


def read_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a JSONL file, each with `file:line`; empty lines are passed over.

    Raises:
        DataError: no such file, nothing in it, or a line that is no JSON object.

    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    found = [(f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise DataError(f"{path} has no lines")
    return [(where, _object(line, where)) for where, line in found]


def conversation(row: dict[str, Any], where: str) -> Messages:
    """What a line asks: its `prompt`, or its `messages` without the answer at their end.

    Raises:
        DataError: the line has neither, or nothing is asked.

    """
    if isinstance(prompt := row.get("prompt"), str) and prompt:
        return ask(prompt)
    messages = row.get("messages") or row.get("prompt")
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise DataError(f"{where}: neither a prompt nor messages with role and content")
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise DataError(f"{where}: nothing is asked before the answer")
    return messages


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: no JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: no JSON object")
    return row


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message


def _with_prefix(words: int, prefix_tokens: int, seed: int, level: str, index: int, salt: str) -> str:
    shared = min(prefix_tokens, words - 1)
    prefix = make_prompt(shared, f"prefix {seed} {level}", salt)
    return f"{prefix} {make_prompt(words - shared, f'{seed} {level} {index}', salt)}".strip()


def _salted(messages: Messages, key: str, salt: str) -> Messages:
    """Begin with a few words that no other run begins with, but other requests of this pass do."""
    first = messages[0]
    if not salt or not isinstance(first["content"], str):
        return messages
    head = make_prompt(_SALT_WORDS, key, salt)
    return [{**first, "content": f"{head}. {first['content']}"}, *messages[1:]]
