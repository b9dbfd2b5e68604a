"""Every route of the installed SGLang's HTTP server, read from its source: importing it takes 15 s."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

_FILES = ("http_server.py", "v1_loads.py", "elastic_ep.py")
_VERBS = {"get", "post", "put", "delete", "head", "patch"}
_FASTAPIS_OWN = ("/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc")


class NativeRoute(NamedTuple):
    """One route and one method of it; WEBSOCKET for a websocket."""

    method: str
    path: str


def native_routes() -> list[NativeRoute]:
    """All of them; path parameters have the value `x`."""
    (sglang,) = find_spec("sglang").submodule_search_locations
    folder = Path(sglang) / "srt" / "entrypoints"
    found = {route for name in _FILES for route in _routes(ast.parse((folder / name).read_text()))}
    return sorted(found | {NativeRoute("GET", path) for path in _FASTAPIS_OWN})


def _routes(tree: ast.Module) -> Iterator[NativeRoute]:
    for node in ast.walk(tree):
        decorators = node.decorator_list if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else []
        for call in decorators:
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
                continue
            verb, owner = call.func.attr, getattr(call.func.value, "id", "")
            if owner not in {"app", "router"} or verb not in _VERBS | {"api_route", "websocket"}:
                continue
            for path in _paths(call.args[0]):
                for method in _methods(call, verb):
                    yield NativeRoute(method, path)


def _paths(said: ast.expr) -> list[str]:
    """What it is by default: some are given by a variable of the environment."""
    texts = [node.value for node in ast.walk(said) if isinstance(node, ast.Constant)]
    paths = [text for text in texts if isinstance(text, str) and text.startswith("/")]
    if not paths and isinstance(said, ast.Name):
        return []  # whose value is the environment's alone
    assert paths, ast.unparse(said)
    return [path.replace("{model:path}", "x").replace("{response_id}", "x").replace("{method}", "x") for path in paths]


def _methods(call: ast.Call, verb: str) -> list[str]:
    given = next((keyword.value for keyword in call.keywords if keyword.arg == "methods"), None)
    return ast.literal_eval(given) if given else [verb.upper()]
