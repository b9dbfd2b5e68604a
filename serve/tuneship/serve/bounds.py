"""What one request may ask for without ending the engine for all: checked here, because SGLang does not.

Each of these, found by `bench/studies/malformed.py` and by hand, ends or holds up SGLang 0.5.17 with a single request
that its own checks let pass:

| request | what becomes of the engine |
|---|---|
| a token id outside the vocabulary (`prompt`, `input_ids`; `stop_token_ids` with `min_tokens`) | ends, also on a GPU |
| more top log-probabilities than there are tokens | ends |
| `top_k` beyond 32 bits, a `logit_bias` beyond a float | ends |
| a JSON schema that refers to itself and to nothing else (`{"$ref": "#"}`) | ends |
| `n` of a million | hangs |
| `stop_regex` that backtracks, a chat template of the client's own | may hang: code of the client's |

And `tools` with a chat template that shows none to the model: SGLang would leave them out without a word, or answer
with a call's JSON as plain text.

Where OpenAI documents a limit it is the limit, and numbers must be numbers: SGLang would read them from strings too.
What SGLang refuses itself is left to it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from tuneship.core import checkpoint
from tuneship.serve import tools
from tuneship.serve.refusals import Refusal

MAX_CHOICES = 128
"""Of one prompt; OpenAI's limit of `n`."""
MAX_ANSWERS = 1024
"""Of one request: prompts times choices."""
_RANGES: Mapping[str, tuple[float, float]] = {
    "n": (1, MAX_CHOICES),
    "best_of": (1, MAX_CHOICES),
    "top_logprobs": (0, 20),
    "logprobs": (0, 20),
    "top_k": (-1, 2**31 - 1),
}
_BIAS = 100
_CLIENTS_CODE = frozenset({"stop_regex"})
_TEMPLATES_OWN = frozenset(
    {
        *("chat_template", "conversation", "messages", "tools", "documents", "add_generation_prompt", "tokenize"),
        *("continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "tokenizer_kwargs"),
    }
)
"""Arguments of the function that renders a chat; a template's own variables have other names."""
_UNKNOWN_VOCABULARY = 2**31
_SCHEMAS = frozenset({"schema", "parameters", "json_schema"})
_ALTERNATIVES = ("anyOf", "oneOf", "allOf")


class Facts(NamedTuple):
    """What a request must know of the base that it goes to."""

    tokens: int = _UNKNOWN_VOCABULARY
    """It has an embedding for; a number that is too large where the checkpoint does not say."""
    takes_tools: bool = True
    """Whether its chat template shows them to the model."""
    ends: tuple[int, ...] = ()
    """The tokens at which it stops."""


@lru_cache
def facts(model: Path) -> Facts:
    """Read them from the checkpoint in `model`."""
    template = checkpoint.chat_template(model)
    takes_tools = not template or bool(tools.parser(template))
    return Facts(_tokens(model), takes_tools, tuple(checkpoint.end_token_ids(model)))


def _tokens(model: Path) -> int:
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        return int(config.get("vocab_size") or config["text_config"]["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return _UNKNOWN_VOCABULARY


def check(asked: Mapping[str, Any], base: Facts) -> None:
    """Refuse a request that would harm others, or that could only be answered as if it had asked for less.

    Raises:
        Refusal: 400, with the parameter.

    """
    tokens = base.tokens
    for key in asked.keys() & _CLIENTS_CODE:
        raise _refusal(key, "is not accepted here: it could hold up every other request")
    for key, (least, most) in _RANGES.items():
        _in_range(key, asked.get(key), least, min(most, tokens) if key.endswith("logprobs") else most)
    _bias(asked.get("logit_bias"))
    if asked.get("stop_token_ids") is not None:
        _ids("stop_token_ids", asked["stop_token_ids"], tokens)
    _rows("input_ids", asked.get("input_ids"), tokens)
    prompts = _rows("prompt", asked.get("prompt"), tokens)
    if prompts * max(asked.get("n") or 1, asked.get("best_of") or 1) > MAX_ANSWERS:
        raise _refusal(
            "n", f"and the number of prompts ask for more than {MAX_ANSWERS} answers", code="too_many_answers"
        )
    template = asked.get("chat_template_kwargs")
    for name in sorted(_TEMPLATES_OWN & template.keys()) if isinstance(template, dict) else ():
        raise _refusal("chat_template_kwargs", f"cannot set {name!r}")
    if not isinstance(asked.get("response_format"), dict | None):
        raise _refusal("response_format", "must be an object")  # SGLang answers 500
    for key in ("response_format", "tools"):
        if any(_refers_to_itself(schema) for schema in _schemas(asked.get(key))):
            raise _refusal(key, "has a JSON schema that refers to itself and describes nothing")
    if asked.get("tools") and not base.takes_tools and asked.get("tool_choice") != "none":
        raise _refusal("tools", "would never be seen: this model's chat template has none", code="tools_not_supported")


def _in_range(key: str, value: object, least: float, most: float) -> None:
    if value is None or (isinstance(value, bool) and key == "logprobs"):
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _refusal(key, "must be a number")
    if not least <= value <= most:
        raise _refusal(key, f"must lie between {least:g} and {most:g}")


def _bias(biases: object) -> None:
    if not isinstance(biases, dict):
        return
    for value in biases.values():
        if isinstance(value, bool) or not isinstance(value, int | float) or not -_BIAS <= value <= _BIAS:
            raise _refusal("logit_bias", f"must hold numbers between {-_BIAS} and {_BIAS}")


def _ids(key: str, ids: object, tokens: int) -> None:
    if not isinstance(ids, list) or not {*map(type, ids)} <= {int}:
        raise _refusal(key, "must be a list of token ids")
    if ids and not (min(ids) >= 0 and max(ids) < tokens):
        raise _refusal(key, f"has a token id that is none of the model's: they go from 0 to {tokens - 1}")


def _rows(key: str, value: object, tokens: int) -> int:
    """How many prompts `value` is: a text, token ids, or a list of either."""
    if not isinstance(value, list):
        return 1
    kinds = {*map(type, value)}
    if kinds == {int}:
        _ids(key, value, tokens)
        return 1
    if kinds == {list}:
        for row in value:
            _ids(key, row, tokens)
    elif kinds - {str}:
        raise _refusal(key, "must be a text, a list of token ids, or a list of either")
    return len(value)


def _schemas(value: object) -> Iterator[dict[str, Any]]:
    """The JSON schemas in a `response_format` or in `tools`, wherever they stand."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in _SCHEMAS and isinstance(inner, dict):
                yield inner
            yield from _schemas(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _schemas(inner)


def _refers_to_itself(schema: dict[str, Any]) -> bool:
    """Whether following references and alternatives alone, never a property or an item, leads in a circle."""
    finished: set[int] = set()

    def circles(node: object, above: frozenset[int]) -> bool:
        if not isinstance(node, dict) or id(node) in finished:
            return False
        if id(node) in above:
            return True
        deeper = above | {id(node)}
        found = any(circles(inner, deeper) for inner in _same_place(node, schema))
        finished.add(id(node))
        return found

    return any(circles(node, frozenset()) for node in _nodes(schema))


def _same_place(node: dict[str, Any], root: dict[str, Any]) -> Iterator[object]:
    """The schemas that describe the same value as `node` does."""
    if isinstance(node.get("$ref"), str):
        yield _target(root, node["$ref"])
    for key in _ALTERNATIVES:
        if isinstance(node.get(key), list):
            yield from node[key]


def _nodes(value: object) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    inner: Sequence[object] = (
        list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ()
    )
    for each in inner:
        yield from _nodes(each)


def _target(root: dict[str, Any], reference: str) -> object:
    """What a reference within the schema points to; None for any other."""
    if not reference.startswith("#"):
        return None
    found: Any = root
    for step in reference.removeprefix("#").split("/")[1:]:
        found = found.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
    return found


def _refusal(key: str, problem: str, *, code: str = "invalid_value") -> Refusal:
    return Refusal(400, code, f"{key!r} {problem}.", param=key)
