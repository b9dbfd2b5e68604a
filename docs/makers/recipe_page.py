"""docs/reference/recipe.md: every key of a recipe, from the pydantic models and the docstrings below their keys."""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
import types
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import tomli_w
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tuneship.core.recipe import Recipe
from tuneship.core.recipe_section import Section

_HEAD = """\
# The recipe's keys

Made by `make reference` from `tuneship/core/recipe*.py`; not written by hand. Only `model.id` and `data.train` have no
default. Every key is an option too: `tuneship up RECIPE --lora.rank 8 --bench.eval.0.limit 20`. Paths are relative to
the recipe. Combinations that make no sense are refused when the recipe is read, naming both keys.
"""
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below", "pattern": "like"}
_WORDS = {str: "text", int: "whole number", float: "number", bool: "`true`, `false`"}


class Key(NamedTuple):
    """One key of one table."""

    table: str
    name: str
    value: str
    default: str
    text: str


def page() -> str:
    """The page, as Markdown."""
    parts = [_HEAD]
    for table, model in tables(Recipe):
        rows = list(keys(table, model))
        if not rows:
            continue
        about = f"{_prose(model)}\n\n" if table else ""
        lines = [f"| `{key.name}` | {key.value} | {key.default} | {key.text} |" for key in rows]
        head = f"## {_title(table)}\n\n{about}| key | value | default | |\n|---|---|---|---|\n"
        parts.append(head + "\n".join(lines) + "\n")
    return "\n".join(parts)


def tables(model: type[Section], prefix: str = "") -> Iterator[tuple[str, type[Section]]]:
    """(dotted name, its model) of every table, in the order of the models."""
    yield prefix, model
    for name, field in model.model_fields.items():
        inner = _section(field.annotation)
        if inner:
            yield from tables(inner, f"{prefix}.{name}".strip("."))


def keys(table: str, model: type[Section]) -> Iterator[Key]:
    """Every key of `model` that is no table itself.

    Raises:
        LookupError: a key has no docstring.

    """
    texts = _docstrings(model)
    for name, field in model.model_fields.items():
        if _section(field.annotation):
            continue
        if name not in texts:
            raise LookupError(f"{model.__name__}.{name} has no docstring")
        text = texts[name]
        if name in model.not_yet:
            text += f" Not yet supported: {', '.join(f'`{_toml(value)}`' for value in model.not_yet[name])}."
        yield Key(table, name, _value(field), _default(field), _cell(text))


def _title(table: str) -> str:
    if not table:
        return "The recipe itself"
    return f"`[[{table}]]`" if table == "bench.eval" else f"`[{table}]`"


def _prose(model: type[BaseModel]) -> str:
    return " ".join(inspect.cleandoc(model.__doc__ or "").split())


def _docstrings(model: type[BaseModel]) -> dict[str, str]:
    """{key: the string below it}."""
    body = ast.parse(textwrap.dedent(inspect.getsource(model))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for here, below in zip(body.body, body.body[1:], strict=False):
        if isinstance(here, ast.AnnAssign) and isinstance(here.target, ast.Name) and isinstance(below, ast.Expr):
            found[here.target.id] = " ".join(str(ast.literal_eval(below.value)).split())
    return found


def _section(annotation: Any) -> type[Section] | None:
    candidates = (annotation, *get_args(annotation))
    return next((each for each in candidates if isinstance(each, type) and issubclass(each, Section)), None)


def _value(field: FieldInfo) -> str:
    """What may be given, in TOML's words."""
    bounds = ", ".join(_bounds(field.metadata))
    return _cell(f"{_words(field.annotation)} {bounds}".strip())


def _words(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation in _WORDS:
        return _WORDS[annotation]
    if origin is Literal:
        return ", ".join(f"`{_toml(value)}`" for value in args)
    if origin in {Union, types.UnionType}:
        return " or ".join(_words(arg) for arg in args)
    if origin is tuple:
        return f"list: {_words(args[0])}"
    if origin is dict:
        return f"table: {_words(args[1])}"
    if hasattr(annotation, "__metadata__"):
        metadata = [inner for each in annotation.__metadata__ for inner in getattr(each, "metadata", [each])]
        return f"{_words(annotation.__origin__)} {', '.join(_bounds(metadata))}".strip()
    raise TypeError(f"no words for {annotation}")


def _bounds(metadata: list[Any]) -> Iterator[str]:
    for each in metadata:
        for name, word in _BOUNDS.items():
            limit = getattr(each, name, None)
            if limit is not None:
                yield f"{word} `{limit}`" if name == "pattern" else f"{word} {limit}"
        if getattr(each, "max_length", None):
            yield f"at most {each.max_length} characters"


def _default(field: FieldInfo) -> str:
    return "**needed**" if field.is_required() else f"`{_toml(field.get_default(call_default_factory=True))}`"


def _toml(value: Any) -> str:
    if value == {}:
        return "{}"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value)
    return tomli_w.dumps({"key": value}).removeprefix("key = ").strip()


def _cell(text: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", text)
