"""Requests that no client should send: the same ones for the same seed.

Every request is bytes, as they go over the wire. `max_tokens` is small wherever a body may turn out to be valid.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

CHAT, COMPLETIONS, TOKENIZE, LOGPROBS = "/v1/chat/completions", "/v1/completions", "/v1/tokenize", "/v1/logprobs"
IN_ORDER = "in order"
FIELDS = (
    *("model", "messages", "prompt", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p"),
    *("n", "best_of", "stop", "stop_token_ids", "min_tokens", "seed", "logprobs", "top_logprobs", "logit_bias"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty", "response_format", "tools", "tool_choice"),
    *("parallel_tool_calls", "stream", "stream_options", "user", "echo", "suffix", "ignore_eos", "skip_special_tokens"),
    *("chat_template_kwargs", "input_ids", "start", "continue_final_message", "reasoning_effort", "regex", "ebnf"),
    *("stop_regex", "return_hidden_states", "return_token_ids", "no_stop_trim", "priority", "separate_reasoning"),
)
ENGINES = (
    "lora_path",
    "lora_id",
    "extra_key",
    "cache_salt",
    "session_params",
    "rid",
    "bootstrap_host",
    "custom_params",
)
_STRANGE = (
    "\x00",
    "\ud83d",
    "\u202e",
    "a" * 5000,
    "sql:alpha",
    ":",
    "alpha@",
    "@",
    "../..",
    "%2e%2e",
    " ",
    "\r\n",
    "\U0001f600",
)
_HUGE = (2**31, 2**63, -(2**63) - 1, 2**64, 10**30, 10**400, 1e308, -1e308, 5e-324, -1, 0, 128, 129, 1000, 100000)
_METHODS = ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "HEAD", "POST", "BREW", "get")
_PATHS = (
    *("/generate", "/flush_cache", "/server_info", "/load_lora_adapter", "/admin/status", "//v1/models", "/v1//models"),
    *(
        "/v1/../admin/status",
        "/v1/%2e%2e/generate",
        "/v1/models/%00",
        "/v1/models/" + "a" * 4000,
        "/v1/models/..%2f..%2f",
    ),
    *(
        "/v1/models/%ff%fe",
        "/v1/chat/completions/",
        "/V1/MODELS",
        "/v1/models?x=" + "y" * 3000,
        "/;/",
        "/v1/models/alpha:x",
    ),
    *("*", "http://other/v1/models", "/v1/models/%F0%9F%98%80", "/v1/embeddings", "/health/", "/docs", "/openapi.json"),
)


class Malformed(NamedTuple):
    """One request. `unanswered`: no answer at all is right too, because the client hung up or never finished."""

    kind: str
    sent: bytes
    unanswered: bool = False


class Target(NamedTuple):
    """Whom the requests are for: names of models that are there, and a key."""

    models: Sequence[str]
    key: str


def requests(count: int, seed: int, target: Target) -> Iterator[Malformed]:
    """`count` of them, of every kind in turn."""
    draw = random.Random(seed)
    kinds = tuple(_KINDS)
    for index in range(count):
        kind = kinds[index % len(kinds)]
        made = _KINDS[kind](draw, target)
        yield made if isinstance(made, Malformed) else Malformed(kind, made)


def http(path: str, body: bytes, key: str, method: str = "POST", headers: Sequence[tuple[str, str]] = ()) -> bytes:
    """A request that ends its connection."""
    lines = [
        f"{method} {path} HTTP/1.1",
        *("Host: door", "Connection: close", "Content-Type: application/json", f"Authorization: Bearer {key}"),
        f"Content-Length: {len(body)}",
        *(f"{name}: {value}" for name, value in headers),
    ]
    return "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n" + body


def valid(draw: random.Random, target: Target) -> tuple[str, dict[str, Any]]:
    """(path, body) of a request that is in order and cheap."""
    path = draw.choice((CHAT, CHAT, COMPLETIONS, TOKENIZE, LOGPROBS))
    body: dict[str, Any] = {"model": draw.choice(target.models)}
    if path == CHAT:
        body |= {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
    elif path == COMPLETIONS:
        body |= {"prompt": "a", "max_tokens": 1}
    elif path == TOKENIZE:
        body |= {"prompt": "a"}
    else:
        body |= {"input_ids": [[1, 2, 3]]}
    return path, body


def _value(draw: random.Random, depth: int = 0) -> Any:
    leaf = [
        None,
        True,
        False,
        draw.choice(_HUGE),
        draw.uniform(-3, 3),
        draw.randint(-5, 600),
        "",
        "x",
        draw.choice(_STRANGE),
    ]
    if depth > 2 or draw.random() < 0.6:
        return draw.choice(leaf)
    inner = [_value(draw, depth + 1) for _ in range(draw.randint(0, 3))]
    return inner if draw.random() < 0.5 else {draw.choice(("role", "type", "a", "content", "")): each for each in inner}


def _json(path: str, body: object, key: str) -> bytes:
    return http(path, json.dumps(body).encode(), key)


def _mutated(draw: random.Random, target: Target) -> bytes:
    path, body = valid(draw, target)
    text = bytearray(json.dumps(body).encode())
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(text))
        change = draw.random()
        if change < 0.4:
            del text[at : at + draw.randint(1, 8)]
        elif change < 0.8:
            text[at:at] = bytes(draw.randrange(256) for _ in range(draw.randint(1, 3)))
        else:
            del text[at:]
        text = text or bytearray(b"{")
    return http(path, bytes(text), target.key)


def _deep(draw: random.Random, target: Target) -> bytes:
    depth = draw.choice((50, 99, 101, 500, 990, 5000, 100_000))
    opening, closing = draw.choice((("[", "]"), ('{"a":', "}"), ('{"items":', "}")))
    inner = f"{opening * depth}1{closing * depth}"
    path, body = valid(draw, target)
    field = draw.choice(("messages", "tools", "response_format", "x"))
    return http(path, (json.dumps(body)[:-1] + f', "{field}": {inner}}}').encode(), target.key)


def _wrong_type(draw: random.Random, target: Target) -> bytes:
    path, body = valid(draw, target)
    for _ in range(draw.choice((1, 1, 2, 3))):
        body[draw.choice(FIELDS)] = _value(draw)
    return _json(path, body, target.key)


def _number(draw: random.Random, target: Target) -> bytes:
    path, body = valid(draw, target)
    text = draw.choice(("NaN", "Infinity", "-Infinity", "1e999", "-0.0", "1e-400", "0x10", "01", "9" * 5000, ".5"))
    field = draw.choice(FIELDS[3:19])
    if draw.random() < 0.6:
        return _json(path, {**body, field: draw.choice(_HUGE)}, target.key)
    return http(path, (json.dumps(body)[:-1] + f', "{field}": {text}}}').encode(), target.key)


def _unknown_field(draw: random.Random, target: Target) -> bytes:
    path, body = valid(draw, target)
    return _json(path, {**body, draw.choice(_STRANGE) or "x": _value(draw), "nonsense": _value(draw)}, target.key)


def _bad_utf8(draw: random.Random, target: Target) -> bytes:
    path, body = valid(draw, target)
    broken = draw.choice((b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\xf0\x9f", b"\x00", b"\xef\xbb\xbf"))
    text = json.dumps(body).encode()
    at = draw.choice((0, len(text) - 3, draw.randrange(len(text))))
    return http(path, text[:at] + broken + text[at:], target.key)


def _strange_text(draw: random.Random, target: Target) -> bytes:
    path, body = valid(draw, target)
    where = draw.choice(("prompt", "messages", "stop", "user"))
    text = draw.choice(_STRANGE)
    return _json(path, body | {where: [{"role": "user", "content": text}] if where == "messages" else text}, target.key)


def _name(draw: random.Random, target: Target) -> bytes:
    path, body = valid(draw, target)
    known = draw.choice(target.models)
    names = (f"{known}:alpha", f":{known}", f"{known}@", f"{known}@000000000000", known.upper(), f" {known}", *_STRANGE)
    return _json(path, body | {"model": draw.choice(names)}, target.key)


def _engines_key(draw: random.Random, target: Target) -> bytes:
    path, body = valid(draw, target)
    return _json(path, body | {draw.choice(ENGINES): draw.choice((None, "alpha", ["alpha"], {}, 1))}, target.key)


def _killer(draw: random.Random, target: Target) -> bytes:
    """What ends or holds up SGLang 0.5.17 (`serve/bounds.py`)."""
    token = draw.choice((-1, 2**31 - 1, 2**40, 10**6))
    deadly: tuple[dict[str, Any], ...] = (
        {"prompt": [token]},
        {"prompt": [[1], [token]]},
        {"input_ids": [token]},
        {"input_ids": [[token]]},
        {"stop_token_ids": [token], "min_tokens": 1},
        {"top_logprobs": draw.choice((1000, 10**9, "1000")), "logprobs": True},
        {"logprobs": 10**9},
        {"n": draw.choice((10**6, "1000000", 1e6))},
        {"prompt": ["a"] * draw.choice((1025, 100_000))},
        {"top_k": draw.choice((2**31, 2**62))},
        {"logit_bias": {"1": draw.choice((1e308, "1e308"))}},
        {"stop_regex": "(a+)+$"},
        {"chat_template_kwargs": {"chat_template": "{% for i in range(99999) %}{% endfor %}"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}},
    )
    path, body = valid(draw, target)
    return _json(path, body | draw.choice(deadly), target.key)


def _path(draw: random.Random, target: Target) -> bytes:
    return http(draw.choice(_PATHS), b"{}", target.key, draw.choice(("GET", "POST")))


def _method(draw: random.Random, target: Target) -> bytes:
    path, body = valid(draw, target)
    path = draw.choice((path, "/v1/models", "/health", "/metrics", "/"))
    return http(path, json.dumps(body).encode(), target.key, draw.choice(_METHODS))


def _headers(draw: random.Random, target: Target) -> Malformed:
    path, body = valid(draw, target)
    bombs = (
        [("X-Bomb", "x" * draw.choice((20_000, 70_000)))],
        [(f"X-{n}", "y" * 30) for n in range(draw.choice((300, 2000)))],
        [("Content-Length", "5")],
        [("Transfer-Encoding", "chunked")],
        [("Transfer-Encoding", "gzip, chunked")],
        [("Content-Encoding", "gzip")],
        [("Expect", "100-continue")],
        [("Upgrade", "websocket"), ("Connection", "Upgrade")],
        [("Bad Name", "x")],
        [("X-Bad", "a\x00b")],
        [("Host", "other")],
    )
    chosen = draw.choice(bombs)
    sent = http(path, json.dumps(body).encode(), target.key, headers=chosen)
    return Malformed("headers", sent, unanswered=chosen[0][0] == "Transfer-Encoding")


def _key(draw: random.Random, target: Target) -> bytes:
    path, body = valid(draw, target)
    key = draw.choice(("", "ts-nobody", target.key[:-1], target.key + "x", "x" * 4000, "\xff\xfe"))
    return _json(path, body, key)


def _length(draw: random.Random, target: Target) -> Malformed:
    """Says that it is longer than it is, and hangs up; or shorter, so that its rest is another request."""
    path, body = valid(draw, target)
    sent = http(path, json.dumps(body).encode(), target.key)
    wrong = draw.choice((-7, 1, 1000, 10**9))
    head, _, text = sent.partition(b"\r\n\r\n")
    said = f"Content-Length: {len(text)}".encode()
    head = head.replace(said, f"Content-Length: {max(len(text) + wrong, 0)}".encode())
    return Malformed("content-length", head + b"\r\n\r\n" + text, unanswered=wrong > 0)


def _chunked(draw: random.Random, target: Target) -> Malformed:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: door\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n"
    head += f"Authorization: Bearer {target.key}\r\n\r\n"
    garbage = draw.choice(
        (b"zz\r\n", b"-1\r\n", b"5\r\nab", b"ffffffffffffffffff\r\n", b"3\r\nabcdef\r\n", b"2\r\n{}\r\n0\r\n\r\n")
    )
    return Malformed("chunks", head.encode() + garbage, unanswered=garbage[:1] in b"5f")


def _no_http(draw: random.Random, _: Target) -> Malformed:
    tls, http2 = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 40, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    noise = bytes(draw.randrange(256) for _ in range(draw.randint(1, 300)))
    return Malformed(
        "no http", draw.choice((tls, http2, noise, b"\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\n")), unanswered=True
    )


def _in_order(draw: random.Random, target: Target) -> bytes:
    """Nothing is wrong with it: among all the others it is answered."""
    path, body = valid(draw, target)
    if path in {CHAT, COMPLETIONS}:
        more: tuple[dict[str, Any], ...] = (
            *({}, {"temperature": 0}, {"stream": True}, {"top_p": 0.5, "seed": 1}, {"stop": "x", "user": "u"}),
            {"n": 2},
        )
        body |= draw.choice(more)
    return _json(path, body, target.key)


_KINDS: dict[str, Callable[[random.Random, Target], bytes | Malformed]] = {
    IN_ORDER: _in_order,
    "mutated json": _mutated,
    "deep nesting": _deep,
    "wrong type": _wrong_type,
    "wrong type, again": _wrong_type,
    "numbers": _number,
    "unknown field": _unknown_field,
    "bad utf-8": _bad_utf8,
    "strange text": _strange_text,
    "model name": _name,
    "engine's key": _engines_key,
    "killer": _killer,
    "path": _path,
    "method": _method,
    "headers": _headers,
    "api key": _key,
    "content-length": _length,
    "chunks": _chunked,
    "no http": _no_http,
}
