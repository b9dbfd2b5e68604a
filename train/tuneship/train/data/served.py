"""Messages and tools as SGLang gives them to a chat template: a model must not learn prompts that no server sends.

The server renders what its API's models make of a request. Of a message that is a fixed set of keys, without those that
are null, and an empty text where there is none. Of a tool it is all keys of its model, null ones too, in its order, and
a template that writes tools as JSON writes them so. tests/integration/test_rendering.py holds this against a server.
"""

from __future__ import annotations

from typing import Any

_KEYS = ("content", "tool_call_id", "name", "reasoning_content")


def message(given: dict[str, Any]) -> dict[str, Any]:
    """One message; what the API does not know of is not there."""
    role = given["role"]
    kept = {key: given[key] for key in (_KEYS[:1] if role == "user" else _KEYS) if given.get(key) is not None}
    if given.get("tool_calls"):
        kept["tool_calls"] = [_call(call) for call in given["tool_calls"]]
    return {"role": role, "content": ""} | kept


def tool(given: dict[str, Any]) -> dict[str, Any]:
    """One function that may be called."""
    function = given.get("function", given)
    described = {key: function.get(key) for key in ("description", "name", "parameters")}
    described["strict"] = bool(function.get("strict"))
    return {"type": "function", "function": described, "defer_loading": None}


def _call(given: dict[str, Any]) -> dict[str, Any]:
    function = given.get("function", given)
    called = {"name": function.get("name"), "arguments": function.get("arguments")}
    return {"id": given.get("id"), "index": given.get("index"), "type": "function", "function": called}
