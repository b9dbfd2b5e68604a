"""Recipes on disk: read TOML, apply dotted overrides, say precisely what is wrong, write the resolved copy."""

from __future__ import annotations

import difflib
import glob
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard, get_args

import tomli_w
from pydantic import BaseModel, ValidationError

from tuneship.core import chat_templates, data_source
from tuneship.core.data_source import Folder
from tuneship.core.errors import DataError, RecipeError
from tuneship.core.files import sha256_text, write_atomic
from tuneship.core.recipe import BUNDLED_PREFIX, Recipe
from tuneship.core.recipe_bench import LM_EVAL_PREFIX, NAMED_WORKLOADS, Bench, BenchEval

_REQUIRED = "model.id and data.train are the two keys without a default"
_TOML_WORDS = {"tuple": "list", "dictionary": "table"}


def load(path: Path, overrides: Mapping[str, str] | None = None) -> Recipe:
    """Read the recipe at `path`, with `{"lora.rank": "8"}`-like overrides, its paths made absolute.

    Raises:
        RecipeError: not there, not TOML, an unknown key, a wrong or a not yet supported value; names file, key and
            reason, and the nearest valid key.

    """
    tree = _read(path)
    for key, text in (overrides or {}).items():
        _set(tree, key, _parse_value(text))
    if called := re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("._-")[:64]:
        tree.setdefault("name", called)  # two recipes in one folder must not share a run
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise _explain(path, tree, error) from None
    return _with_absolute_paths(recipe, path.resolve().parent)


def dump(recipe: Recipe) -> str:
    """The recipe as TOML, every key spelled out."""
    return tomli_w.dumps(recipe.model_dump(mode="json"))


def save(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe, so that a result can be repeated from what lies beside it."""
    write_atomic(path, dump(recipe))


def digest(recipe: Recipe, *sections: str) -> str:
    """Hex SHA-256 of the named sections (of the whole recipe when none is named)."""
    chosen = {name: getattr(recipe, name) for name in sections} if sections else {"": recipe}
    return sha256_text("\n".join(f"{name}={value.model_dump_json()}" for name, value in sorted(chosen.items())))


def data_files(pattern: str) -> list[Path]:
    """The files that a path or a glob stands for, sorted.

    Raises:
        DataError: nothing is there, or a folder.

    """
    found = data_source.locate(pattern)
    if isinstance(found, Folder):
        raise DataError(f"{pattern} is a folder", hint="name its files: a path or a glob")
    return found


def bench_files(recipe: Recipe) -> list[str]:
    """What measuring reads besides models: paths or globs of rows, scorers, schemas, prompts and arrivals."""
    load = recipe.bench.load
    prompts = recipe.data.heldout if load.workload == "heldout" else load.workload
    found = [load.trace, "" if prompts in NAMED_WORKLOADS else prompts]
    for task in recipe.bench.eval:
        schema = task.options.get("schema")
        file = _scorer_file(task.task)
        found += [task.data, file, schema if _is_schema_file(schema) else ""]
        if task.task.startswith(LM_EVAL_PREFIX) and file:  # its data and code lie beside it
            found.append(f"{glob.escape(str(Path(file).parent))}/*")
    return [path for path in found if path]


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"no recipe at {path}", hint="recipes/quickstart.toml is one to start from") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read {path}: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(
            f"{path}: not valid TOML: {error}", hint="strings need quotes; tables look like [lora]"
        ) from None


def _parse_value(text: str) -> Any:
    """`8`, `true`, `[1, 4]` as TOML reads them; anything else is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    here: Any = tree
    for part in parents:
        here = _step(here, part, key)
    if isinstance(here, list):
        here[_index(here, last, key)] = value
    else:
        here[last] = value


def _step(here: Any, part: str, key: str) -> Any:
    child = here[_index(here, part, key)] if isinstance(here, list) else here.setdefault(part, {})
    if not isinstance(child, dict | list):
        raise RecipeError(f"--{key}: {part} is a value, not a table")
    return child


def _index(items: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise RecipeError(f"--{key}: {part} is not an index into {len(items)} entries", hint="counting starts at 0")
    return int(part)


def _explain(path: Path, tree: dict[str, Any], error: ValidationError) -> RecipeError:
    """The first complaint in the reader's words; how many more there are in the hint."""
    complaints = [(_location(tree, item["loc"]), item) for item in error.errors()]
    location = _deepest_of_first(complaints)
    here = [item for where, item in complaints if where == location]
    first, key = here[0], ".".join(str(part) for part in location)
    if first["type"] == "extra_forbidden":
        message, hint = f"unknown key {key!r}", _nearest(location)
    elif first["type"] == "missing":
        message, hint = f"{key!r} is missing", "" if "bench" in location else _REQUIRED
    elif first["type"] == "value_error":
        message = str(first["ctx"]["error"]) if not key else f"in [{key}]: {first['ctx']['error']}"
        hint = ""
    else:
        message, hint = f"{key!r} = {_lookup(tree, location)!r}: {_either(item['msg'] for item in here)}", ""
    more = len({tuple(where) for where, _ in complaints if where != location[: len(where)]})
    if more:
        hint = f"{hint + '; ' if hint else ''}{more} more after this one"
    return RecipeError(f"{path}: {message}", hint=hint)


def _location(tree: Any, parts: tuple[int | str, ...]) -> list[int | str]:
    """The keys in `parts`, which also names the tried branch of `"auto" | int`: that is in no recipe."""
    location: list[int | str] = []
    for number, part in enumerate(parts):
        known = part in tree if isinstance(tree, dict) else isinstance(tree, list) and isinstance(part, int)
        if known:
            tree = tree[part]
        if known or (isinstance(tree, dict) and number == len(parts) - 1):  # a missing key is named too
            location.append(part)
    return location


def _deepest_of_first(complaints: list[tuple[list[int | str], Any]]) -> list[int | str]:
    """Where the first complaint points; for a union, the place inside the branch that came furthest."""
    first = complaints[0][0]
    below = [where for where, _ in complaints if where[: len(first)] == first]
    return next((where for where in below if len(where) > len(first)), first)


def _either(messages: Iterable[str]) -> str:
    """`input should be 'auto' or a valid integer`: the branches of a union in one sentence, in TOML's words."""
    first, *others = dict.fromkeys(message.partition(" or instance of")[0] for message in messages)
    text = " or ".join([first[:1].lower() + first[1:], *(other.removeprefix("Input should be ") for other in others)])
    return re.sub(r"valid (tuple|dictionary)", lambda match: f"valid {_TOML_WORDS[match[1]]}", text)


def _lookup(tree: Any, location: list[int | str]) -> Any:
    for part in location:
        tree = tree[part]
    return tree


def _nearest(location: list[int | str]) -> str:
    """'did you mean lora.rank?' for a key of another table, or a mistyped one of this table."""
    *parents, wrong = [str(part) for part in location]
    by_table = _keys(Recipe)
    table = ".".join(part for part in parents if not part.isdigit())
    elsewhere = [f"{name}.{key}".strip(".") for name, keys in by_table.items() for key in keys if key == wrong]
    if elsewhere:
        return f"did you mean {elsewhere[0]!r}?"
    match = difflib.get_close_matches(wrong, by_table.get(table, ()), n=1)
    if match:
        return f"did you mean {'.'.join([*parents, match[0]])!r}?"
    return f"[{table or 'recipe'}] knows: {', '.join(by_table.get(table, ()))}"


def _keys(model: type[BaseModel], prefix: str = "") -> dict[str, list[str]]:
    """{table: its keys} over the whole recipe."""
    found = {prefix: list(model.model_fields)}
    for name, field in model.model_fields.items():
        inner = next((t for t in (field.annotation, *get_args(field.annotation)) if _is_section(t)), None)
        if inner:
            found |= _keys(inner, f"{prefix}.{name}".strip("."))
    return found


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _with_absolute_paths(recipe: Recipe, root: Path) -> Recipe:
    def absolute(text: str) -> str:
        return str((root / text).resolve()) if text else text

    data = recipe.data.model_copy(
        update={
            "train": data_source.absolute(recipe.data.train, root),
            "heldout": data_source.absolute(recipe.data.heldout, root),
            # The text and not the path: a run is what the template was when it began.
            "template": chat_templates.resolve(recipe.data.template, root),
        }
    )
    local = not recipe.model.id.startswith(BUNDLED_PREFIX) and (root / recipe.model.id).is_dir()
    model = recipe.model.model_copy(update={"id": absolute(recipe.model.id)}) if local else recipe.model
    bench = _absolute_bench(recipe.bench, absolute, root)
    return recipe.model_copy(update={"data": data, "bench": bench, "model": model})


def _absolute_bench(bench: Bench, absolute: Callable[[str], str], root: Path) -> Bench:
    load = bench.load
    workload = load.workload if load.workload in NAMED_WORKLOADS else absolute(load.workload)
    return bench.model_copy(
        update={
            "load": load.model_copy(update={"trace": absolute(load.trace), "workload": workload}),
            "eval": tuple(_absolute_eval(task, absolute, root) for task in bench.eval),
            "gate": bench.gate.model_copy(update={"baseline": absolute(bench.gate.baseline)}),
        }
    )


def _absolute_eval(task: BenchEval, absolute: Callable[[str], str], root: Path) -> BenchEval:
    file = _scorer_file(task.task)
    before, _, after = task.task.partition(":")
    options = {
        key: absolute(value) if key == "schema" and _is_schema_file(value) else value
        for key, value in task.options.items()
    }
    return task.model_copy(
        update={
            "data": data_source.absolute(task.data, root),
            "task": f"{before}:{absolute(file)}{after[len(file) :]}" if file else task.task,
            "options": options,
        }
    )


def _scorer_file(task: str) -> str:
    """FILE.py of `python:FILE.py:function`, FILE.yaml of `lm-eval:FILE.yaml`; empty for any other task."""
    if task.startswith(LM_EVAL_PREFIX):
        return task.removeprefix(LM_EVAL_PREFIX) if task.endswith((".yaml", ".yml")) else ""
    prefix, _, rest = task.partition(":")
    return rest.rpartition(":")[0] if prefix == "python" else ""


def _is_schema_file(schema: object) -> TypeGuard[str]:
    """Whether it names a file, and is not the schema itself."""
    return isinstance(schema, str) and bool(schema) and not schema.lstrip().startswith("{")
