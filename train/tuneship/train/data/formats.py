"""One row, in whichever format it is written, as a conversation.

| format | columns |
|---|---|
| messages | `messages`, `tools` |
| sharegpt | `conversations` of {from, value}, `system`, `tools` |
| alpaca | `instruction`, `input`, `output` or `response`, `system`, `history` |
| prompt-completion | `prompt`, `completion`: texts, or lists of messages; `tools` |
| text | `text` |

`auto` takes the first of them whose columns are in the row. `data.columns` says which own column stands for one of
these. Columns of lists may hold JSON instead, as CSV has no other way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tuneship.core.errors import DataError
from tuneship.core.recipe import FORMAT_COLUMNS, Data
from tuneship.train.data.messages import calls, checked, json_of, tools
from tuneship.train.data.template import Conversation, Message

_SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bot"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
    "function_call": "function_call",
}


def conversation(row: Any, data: Data) -> Conversation:
    """The conversation, or the plain text, that `row` holds.

    Raises:
        DataError: it is in none of the formats, or what it holds is no conversation that ends with an answer.

    """
    if not isinstance(row, dict):
        raise DataError(f"a row is an object, not {type(row).__name__}")
    named = _renamed(row, data.columns)
    name = next((name for name in candidates(data) if _has(named, name)), None)
    if name is None:
        wanted = _WANTED["auto"] if len(candidates(data)) > 1 else _WANTED[candidates(data)[0]]
        raise DataError(
            f"has the keys {_keys(named)}; wanted {wanted}",
            hint='own names: data.columns = { prompt = "YOUR COLUMN", completion = "YOUR OTHER COLUMN" }',
        )
    if name == "text":
        text = named["text"]
        if not isinstance(text, str) or not text.strip():
            raise DataError("text has no text")
        return Conversation([], text=text)
    messages = checked(_READ[name](named))
    return Conversation(messages, tools(named.get("tools")) if "tools" in FORMAT_COLUMNS[name] else None)


def candidates(data: Data) -> list[str]:
    """The formats that a row may have, in the order in which they are looked for."""
    names = FORMAT_COLUMNS if data.format == "auto" else (data.format,)
    return [name for name in names if data.columns.keys() <= set(FORMAT_COLUMNS[name])]


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row by the names of its format; a column that stands for another is not itself any more."""
    for name, column in columns.items():
        if column not in row:
            raise DataError(f"has no column {column!r} (data.columns.{name}); its columns are {_keys(row)}")
    kept = {key: value for key, value in row.items() if key not in columns.values()}
    return kept | {name: row[column] for name, column in columns.items()}


def _has(row: Mapping[str, Any], name: str) -> bool:
    there = {key for key, value in row.items() if value is not None}
    return any(needed <= there for needed in _NEEDED[name])


def _keys(row: Mapping[str, Any]) -> str:
    return ", ".join(map(str, row)) or "none"


def _messages(row: Mapping[str, Any]) -> Any:
    return row["messages"]


def _sharegpt(row: Mapping[str, Any]) -> list[Message]:
    turns = json_of(row["conversations"], "conversations")
    if not isinstance(turns, list) or not turns:
        raise DataError("conversations is not a list of turns")
    return _with_system(row, [_turn(index, turn) for index, turn in enumerate(turns)])


def _turn(index: int, turn: Any) -> Message:
    """{from, value}, or a message that was put into a column of this name."""
    if not isinstance(turn, dict):
        raise DataError(f"turn {index} is no object")
    if "role" in turn:
        return turn
    role = _SPEAKERS.get(str(turn.get("from")))
    if role is None:
        raise DataError(f"turn {index} is from {turn.get('from')!r}, none of {', '.join(_SPEAKERS)}")
    if role == "function_call":
        return {"role": "assistant", "tool_calls": calls(turn.get("value") or "", f"turn {index}")}
    return {"role": role, "content": turn.get("value")}


def _alpaca(row: Mapping[str, Any]) -> list[Message]:
    asked = "\n".join(part for part in (_optional(row, "instruction"), _optional(row, "input")) if part.strip())
    answer = row["output"] if row.get("output") is not None else row["response"]
    before: list[Message] = []
    history = json_of(row.get("history") or [], "history")
    if not isinstance(history, list) or any(not isinstance(pair, list) or len(pair) != _PAIR for pair in history):
        raise DataError("history is not a list of [question, answer]")
    for pair in history:
        before += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return _with_system(row, [*before, *turns])


def _prompt_completion(row: Mapping[str, Any]) -> list[Message]:
    return [*_side(row["prompt"], "user"), *_side(row["completion"], "assistant")]


def _side(value: Any, role: str) -> list[Message]:
    """A text of `role`, or messages."""
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _with_system(row: Mapping[str, Any], turns: list[Message]) -> list[Message]:
    system = _optional(row, "system")
    if not system.strip():
        return turns
    if turns[0].get("role") == "system":
        raise DataError("has a column system and a turn of the system: which of them counts is not clear")
    return [{"role": "system", "content": system}, *turns]


def _optional(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str | None):
        raise DataError(f"{column} is {type(value).__name__}, not text")
    return value or ""


_PAIR = 2
_READ: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt-completion": _prompt_completion,
}
_NEEDED: dict[str, tuple[set[str], ...]] = {
    "messages": ({"messages"},),
    "sharegpt": ({"conversations"},),
    "alpaca": ({"instruction", "output"}, {"instruction", "response"}),
    "prompt-completion": ({"prompt", "completion"},),
    "text": ({"text"},),
}
_WANTED = {
    "messages": "messages",
    "sharegpt": "conversations",
    "alpaca": "instruction with output or response",
    "prompt-completion": "prompt and completion",
    "text": "text",
    "auto": "messages, conversations, instruction with output or response, prompt and completion, or text",
}
