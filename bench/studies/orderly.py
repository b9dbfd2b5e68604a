"""Whether nothing is wrong with a request: then an engine that fails on it has a fault of its own.

    in_order(http("/v1/completions", b'{"model": "sql", "prompt": "a"}', key))    # True

The body's fields are those that have one clear meaning, each of its type and range; other names mean nothing.
What it leaves out it does not vouch for: False is no fault.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from malformed_requests import CHAT, COMPLETIONS, ENGINES, FIELDS, LOGPROBS, TOKENIZE


def in_order(sent: bytes) -> bool:
    """Whether these bytes are a request to a model with which nothing is wrong."""
    head, _, body = sent.partition(b"\r\n\r\n")
    line, *headers = head.decode("latin-1").split("\r\n")
    lengths = [int(value) for value in _length_of(headers)]
    if line not in {f"POST {path} HTTP/1.1" for path in _MUST} or lengths != [len(body)]:
        return False
    if any(header.lower().startswith(("transfer-encoding:", "content-encoding:")) for header in headers):
        return False
    try:
        asked = json.loads(body)
        body.decode("utf-8")
        json.dumps(asked, ensure_ascii=False).encode("utf-8")  # no half of a surrogate pair
    except ValueError:
        return False
    if not isinstance(asked, dict) or asked.keys() & (_KNOWN - _MEANS.keys()):
        return False
    needed = _MUST[line.split(" ")[1]]
    return needed <= asked.keys() and all(_MEANS[key](asked[key]) for key in asked.keys() & _MEANS.keys())


def _length_of(headers: Sequence[str]) -> Iterator[str]:
    for header in headers:
        name, _, value = header.partition(":")
        if name.lower() == "content-length":
            yield value


def _whole(least: int, most: int) -> Callable[[object], bool]:
    return lambda value: type(value) is int and least <= value <= most


def _are_messages(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_message(each) for each in value)


def _is_message(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"role", "content"}
        and value["role"] in {"system", "user", "assistant"}
        and isinstance(value["content"], str)
    )


def _are_ids(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(row, list) and row and all(_whole(0, 100)(token) for token in row) for row in value)
    )


_MUST: Mapping[str, set[str]] = {
    CHAT: {"model", "messages"},
    COMPLETIONS: {"model", "prompt"},
    TOKENIZE: {"model", "prompt"},
    LOGPROBS: {"model", "input_ids"},
}
_MEANS: Mapping[str, Callable[[Any], bool]] = {
    "model": lambda value: isinstance(value, str),
    "messages": _are_messages,
    "prompt": lambda value: isinstance(value, str) and bool(value),
    "input_ids": _are_ids,
    "max_tokens": _whole(1, 1000),
    "temperature": lambda value: type(value) in {int, float} and 0 <= value <= 2,
    "top_p": lambda value: type(value) in {int, float} and 0 < value <= 1,
    "n": _whole(1, 128),
    "seed": _whole(0, 2**31 - 1),
    "stop": lambda value: isinstance(value, str) and bool(value),
    "user": lambda value: isinstance(value, str),
    "stream": lambda value: isinstance(value, bool),
}
_KNOWN = {*FIELDS, *ENGINES}
