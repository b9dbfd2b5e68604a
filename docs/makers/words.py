"""An expression of the source as a reader sees its value: literals as they are, what comes later as `<name>`."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from itertools import product

_TRANSPARENT = {
    *("abs", "escape", "float", "gib", "list", "map", "on_one_line", "quoted", "repr", "sorted", "str", "tail"),
    *("_short", "_some"),
}
"""Calls that say the same as what they are given."""


def constants(trees: Iterable[ast.Module]) -> dict[str, str]:
    """{name: text} of the modules' constants that are literals; of two that differ under one name, none."""
    found: dict[str, str] = {}
    twice = set()
    for tree in trees:
        for node in tree.body:
            if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)):
                continue
            name, value = node.targets[0].id, node.value
            if isinstance(value, ast.Constant) and isinstance(value.value, str | int | float) and name.upper() == name:
                text = f"{value.value:g}" if isinstance(value.value, float) else str(value.value)
                if found.setdefault(name, text) != text:
                    twice.add(name)
    return {name: text for name, text in found.items() if name not in twice}


class Words:
    """Reads expressions of one file."""

    def __init__(self, tree: ast.Module, known: Mapping[str, str]) -> None:
        self.known = dict(known) | constants([tree])
        self._open: set[str] = set()
        """Names that are being looked up: `text = text + more` needs no answer of itself."""
        self._functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]

    def texts(self, node: ast.expr) -> list[str]:
        """What it may say: several where it is chosen between literals; [""] where nothing of it is a literal."""
        found = self._texts(node)
        return [text for text in found if _says_something(text)] or [""]

    def shown(self, node: ast.expr) -> str:
        """The value in one text: a literal, or `<name>`."""
        return self._texts(node)[0] or f"<{self.name(node)}>"

    def name(self, node: ast.AST) -> str:  # noqa: C901, PLR0911, PLR0912 - one line for each kind of expression
        """What a reader would call the value."""
        match node:
            case ast.Name(id=name):
                return name.strip("_")
            case ast.Attribute(value=ast.Call(func=ast.Name(id="type")), attr="__name__"):
                return "type"
            case ast.Attribute(attr=name):
                return name.strip("_")
            case ast.Subscript(slice=ast.Constant(value=str(name))):
                return name
            case ast.Subscript(value=value) | ast.Starred(value=value) | ast.Await(value=value):
                return self.name(value)
            case ast.Call(func=ast.Attribute(value=ast.Constant(), attr="join"), args=[given]):
                return self.name(given)
            case ast.Call(func=ast.Name(id="len")):
                return "number"
            case ast.Call(func=ast.Name(id=function), args=[*_, given]) if function in _TRANSPARENT:
                return self.name(given)
            case ast.Call(func=ast.Attribute(value=value)):
                return self.name(value)
            case ast.Call(func=function):
                return self.name(function)
            case ast.IfExp(body=body) | ast.GeneratorExp(elt=body) | ast.ListComp(elt=body):
                return self.name(body)
            case ast.BinOp(left=left, right=right):
                return self.name(left if not isinstance(left, ast.Constant) else right)
            case ast.BoolOp(values=[first, *_]):
                return self.name(first)
            case _:
                return "..."

    def _texts(self, node: ast.expr) -> list[str]:  # noqa: PLR0911 - as above
        match node:
            case ast.Constant(value=value):
                return [str(value)]
            case ast.JoinedStr(values=parts):
                chosen = [self._part(part) for part in parts]
                return ["".join(each) for each in product(*chosen)]
            case ast.IfExp(body=body, orelse=other):
                return [*self._texts(body), *self._texts(other)]
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return [one + other for one in self._spelt(left) for other in self._spelt(right)]
            case ast.Name(id=name) | ast.Attribute(attr=name) if name in self.known:
                return [self.known[name]]
            case ast.Name(id=name):
                return self._assigned(name, node) or [""]
            case _:
                return [""]

    def _spelt(self, node: ast.expr) -> list[str]:
        return [text or f"<{self.name(node)}>" for text in self._texts(node)]

    def _part(self, part: ast.expr) -> list[str]:
        if not isinstance(part, ast.FormattedValue):
            return self._texts(part)
        value = part.value
        if isinstance(value, ast.Name | ast.Attribute) and self.name_of(value) in self.known:
            return [self.known[self.name_of(value)]]
        said = self._assigned(value.id, value) if isinstance(value, ast.Name) else []
        return [text for text in said if _says_something(text)] or [f"<{self.name(value)}>"]

    @staticmethod
    def name_of(node: ast.Name | ast.Attribute) -> str:
        """The last name, as it is written."""
        return node.id if isinstance(node, ast.Name) else node.attr

    def _assigned(self, name: str, used: ast.Name) -> list[str]:
        """What the innermost function around `used` assigns to `name`."""
        if name in self._open:
            return []
        around = [each for each in self._functions if each.lineno <= used.lineno <= (each.end_lineno or 0)]
        if not around:
            return []
        values: list[str] = []
        self._open.add(name)
        for node in ast.walk(around[-1]):
            if isinstance(node, ast.Assign):
                values += self._given(node.targets[0], node.value, name)
        self._open.remove(name)
        return list(dict.fromkeys(values))

    def _given(self, target: ast.expr, value: ast.expr, name: str) -> list[str]:
        if isinstance(target, ast.Name) and target.id == name and not isinstance(value, ast.Name):
            return self._texts(value)
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            pairs = zip(target.elts, value.elts, strict=True)
            return [text for left, right in pairs for text in self._given(left, right, name)]
        return []


def _says_something(text: str) -> bool:
    """Whether there is a word in it beside what is only known later."""
    depth, plain = 0, ""
    for letter in text:
        depth += (letter == "<") - (letter == ">")
        plain += letter if depth == 0 and letter not in "<>" else ""
    return any(letter.isalpha() for letter in plain)
