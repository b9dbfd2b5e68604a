"""Messages, calls and tools in one form, OpenAI's, in whichever of the usual ones a row has them.

What a chat template is given is made of that when it renders (`served.py`).
"""

from __future__ import annotations

import json
from typing import Any

from tuneship.core.errors import DataError
from tuneship.train.data.template import Message, Tools

ROLES = ("assistant", "system", "tool", "user")


def checked(messages: Any) -> list[Message]:
    """The conversation `messages`, which may be JSON.

    Raises:
        DataError: a message lacks a role or text, or the last is not the assistant's.

    """
    messages = json_of(messages, "messages")
    if not isinstance(messages, list) or not messages:
        raise DataError("messages is not a list of messages")
    found = [_message(index, message) for index, message in enumerate(messages)]
    if found[-1]["role"] != "assistant":
        raise DataError("the last message is not the assistant's")
    return found


def tools(value: Any) -> Tools | None:
    """The functions that may be called, each alone or as OpenAI's API has it; None where there are none.

    Raises:
        DataError: it is no list of functions with names.

    """
    value = json_of(value, "tools") if value else None
    if not value:
        return None
    if not isinstance(value, list):
        raise DataError("tools is not a list of functions")
    found = []
    for index, tool in enumerate(value):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"tool {index} is no function with a name")
        found.append({"type": "function", "function": function})
    return found


def calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Calls of tools, written as OpenAI's API has them or as {name, arguments} alone; arguments may be JSON.

    Raises:
        DataError: one has no name, or arguments that are no object.

    """
    value = json_of(value, f"{where}: tool_calls")
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list):
        raise DataError(f"{where}: tool_calls is not a list of calls")
    return [_call(call, where) for call in value]


def json_of(value: Any, name: str) -> Any:
    """`value`, read where it is JSON in a text: CSV has no lists, and Arrow no objects of different keys."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise DataError(f"{name} is neither a list nor JSON: {error}") from None


def _message(index: int, message: Any) -> Message:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise DataError(f"message {index} has no role out of {', '.join(ROLES)}")
    role = message["role"]
    where = f"message {index} ({role})"
    if message.get("weight") == 0 or message.get("train") is False:
        raise DataError(f"{where} says that it is not to be learnt, which is not yet supported")
    found = {key: value for key, value in message.items() if value is not None and key != "tool_calls"}
    made = calls(message["tool_calls"], where) if message.get("tool_calls") else []
    if made and role != "assistant":
        raise DataError(f"{where} has tool_calls, which are the assistant's")
    found["content"] = _content(message.get("content"), where)
    # A tool may have nothing to say, and a call says enough.
    if not found["content"].strip() and not made and role != "tool":
        raise DataError(f"{where} has no text")
    return found | ({"tool_calls": made} if made else {})


def _content(content: Any, where: str) -> str:
    """A text, or texts in parts, put together as SGLang does for templates that take a text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError(f"{where} is {type(content).__name__}, not text")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise DataError(f"{where} has a part of type {kind!r}: text alone is supported")
        parts.append(part["text"])
    return " ".join(parts)


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{where}: a call has no name")
    # Templates write arguments as JSON: of a text they would make a quoted one.
    arguments = json_of(function.get("arguments") or {}, f"{where}: the arguments of {function['name']}")
    if not isinstance(arguments, dict):
        raise DataError(f"{where}: the arguments of {function['name']} are no object")
    made = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": call["id"], **made} if call.get("id") else made
