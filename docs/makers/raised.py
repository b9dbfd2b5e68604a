"""Every message that tuneship can end with, read from the source: what is raised, and what refusals are made of.

    for found in collect(): print(found.kind, found.text, found.hint)

A part that is only known when it happens is shown as `<its name>`. An error whose text is nowhere in a call of its own
is in `ELSEWHERE`, with where its words come from; any other that cannot be read is a `LookupError`: the page would lack
it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tuneship.core import errors
from words import Words, constants

ROOT = Path(__file__).parents[2]
SOURCES = ("tuneship", "train/tuneship", "serve/tuneship", "bench/tuneship")
_ALL: list[type[errors.TuneshipError]] = [errors.TuneshipError, *errors.TuneshipError.__subclasses__()]
KINDS = {kind.__name__: kind for kind in _ALL}

_SUBCLASSES = {"CannotScore": "EndpointError"}
_GIVEN = {
    ("tuneship/core/versioned.py", "error"): "ArtifactError, EndpointError",
    ("tuneship/core/extras.py", "_needs"): "TuneshipError",
    ("train/tuneship/train/fetch.py", "failure"): "ArtifactError, DataError",
}
"""Calls that make an error of a kind that they were given."""
_PARTS = {"Reason": "PreflightError", "Said": "ParityError"}
"""(fact, fix): of these an error's message is put together."""
_HTTP = {"Refusal": 2, "_refusal": 1, "_unauthorized": 1}
"""{call: which argument is its text}. The door's answers."""
_CHECKED = ("tuneship/core/recipe", "bench/tuneship/bench/quality/tasks/")
"""A ValueError of these becomes the message of a RecipeError, or of a row's DataError."""
ELSEWHERE = {
    "bench/tuneship/bench/quality/evaluate.py": "`FILE:LINE: ` and a task's own words, each of them collected",
    "bench/tuneship/bench/quality/tasks/rows.py": "`FILE:LINE: ` and what pydantic says of the row",
    "bench/tuneship/bench/quality/lm_eval.py": "lm_eval_failures.py explains a child's end",
    "serve/tuneship/serve/choice.py": "a plan's own figures: `MODE needs N GiB, there are M`, and what would fit",
    "serve/tuneship/serve/commands.py": "`--flag: ` and what the recipe's [serve] would say",
    "serve/tuneship/serve/deploy.py": "what kept a version from leaving, each of them collected",
    "serve/tuneship/serve/preflight/__init__.py": "a list of reasons, each of them collected",
    "serve/tuneship/serve/verify/verdict.py": "a verdict's sentence: `Said`",
    "tuneship/core/extras.py": "`_needs`",
    "tuneship/core/stage.py": "`STAGE: ` and what a library raised, in a line",
    "train/tuneship/train/data/check.py": "a row's own reason, each of them collected",
    "train/tuneship/train/data/dataset.py": "a row's own reason, each of them collected",
}


class Found(NamedTuple):
    """One message. `kind` is an error's class, or an HTTP status with its code; `place` the file in the repository."""

    kind: str
    text: str
    hint: str
    place: str


def collect() -> list[Found]:
    """All of them, once each, in the order of the files.

    Raises:
        LookupError: an error is raised whose words cannot be read.

    """
    files = [file for root in SOURCES for file in sorted((ROOT / root).rglob("*.py"))]
    trees = {str(file.relative_to(ROOT)): ast.parse(file.read_text(encoding="utf-8")) for file in files}
    known = constants(trees.values())
    found: dict[tuple[str, str], Found] = {}
    for place, tree in trees.items():
        for one in _in_file(place, tree, Words(tree, known)):
            text = " ".join(one.text.split())
            found.setdefault((one.kind, text), one._replace(text=text))
    return list(found.values())


def _in_file(place: str, tree: ast.Module, words: Words) -> Iterator[Found]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in KINDS | _SUBCLASSES | _PARTS or (place, name) in _GIVEN:
            yield from _errors(place, name, node, words)
        elif name == "ValueError" and place.startswith(_CHECKED):
            kind = "RecipeError" if "recipe" in place else "DataError"
            yield from (Found(kind, text, "", place) for text in words.texts(node.args[0]) if text)
        elif name in _HTTP and len(node.args) > _HTTP[name]:
            yield from _answers(place, name, node, words)
        elif name == "Verdict" and len(node.args) > 2:
            hint = words.texts(node.args[3])[0] if len(node.args) > 3 else ""
            yield from (Found("ParityError", text, hint, place) for text in words.texts(node.args[2]) if text)
    yield from _held(place, tree, words)


def _errors(place: str, name: str, node: ast.Call, words: Words) -> Iterator[Found]:
    texts = [text for text in words.texts(node.args[0]) if text]
    if not texts and name in KINDS and place not in ELSEWHERE:
        raise LookupError(f"{place}:{node.lineno}: the words of this {name} are in no call: see ELSEWHERE")
    given = node.args[1:] + [keyword.value for keyword in node.keywords if keyword.arg in {"hint", "fix"}]
    default = words.known.get("MERGE", "") if name == "Reason" else ""
    hints = [hint for hint in words.texts(given[0]) if hint] if given and name != "_needs" else [default]
    kind = _GIVEN.get((place, name)) or (_SUBCLASSES | _PARTS).get(name, name)
    for text in texts:
        yield Found(kind, text, " / ".join(dict.fromkeys(hints)), place)


def _answers(place: str, name: str, node: ast.Call, words: Words) -> Iterator[Found]:
    """The door's: `400 invalid_value`."""
    if name == "Refusal":
        status, code = (words.shown(each) for each in node.args[:2])
    elif name == "_unauthorized":
        status, code = "401", words.texts(node.args[0])[0]
    else:
        codes = [words.texts(keyword.value)[0] for keyword in node.keywords if keyword.arg == "code"]
        status, code = "400", codes[0] if codes else "invalid_value"
    for text in words.texts(node.args[_HTTP[name]]):
        if text:
            subject = f"{words.shown(node.args[0])} " if name == "_refusal" else ""
            yield Found(f"{status} {code}".strip(), subject + text, "", place)


def _held(place: str, tree: ast.Module, words: Words) -> Iterator[Found]:
    """Fields of an adapter's settings that are refused: {"use_dora": _Held(why, allowed, fix)}."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict) and words.name(node.targets[0]) == "HELD":
            for key, held in zip(node.value.keys, node.value.values, strict=True):
                if key and isinstance(held, ast.Call):
                    fix = words.texts(held.args[2])[0] if len(held.args) > 2 else words.known["MERGE"]
                    text = f"sets {words.texts(key)[0]} = <value>: {words.texts(held.args[0])[0]}"
                    yield Found("PreflightError", text, fix, place)
