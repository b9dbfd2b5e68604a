"""A request's body: read within limits of size and time, and parsed as strictly as the strictest who reads it later."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Iterable
from typing import Any

from starlette.requests import Request

from tuneship.serve.refusals import Refusal

MAX_BODY_BYTES = 10 * 1024 * 1024
BODY_WITHIN_S = 60.0
MAX_DEPTH = 100
"""Of arrays and objects in each other; Python's parser, SGLang's and the grammar compiler give up elsewhere."""
_LONG_NUMBER = re.compile(rb"\d{19}")


async def read(request: Request) -> dict[str, Any]:
    """The JSON object that the request's body is.

    Raises:
        Refusal: 413 too large, 408 too slow, 400 not a JSON object or nested too deeply.
        ClientDisconnect: the client left before it had said all.

    """
    try:
        async with asyncio.timeout(BODY_WITHIN_S):
            body = await _bytes(request)
    except TimeoutError:
        raise Refusal(408, "request_timeout", f"The body did not come within {BODY_WITHIN_S:g} s.") from None
    return parse(body)


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object that `body` is.

    Raises:
        Refusal: 400.

    """
    try:
        # A function for every whole number is slow where there are many: only where one may be too long.
        whole = _in_64_bits if _LONG_NUMBER.search(body) else None
        asked = json.loads(body, parse_constant=_refuse_constant, parse_float=_finite, parse_int=whole)
    except (ValueError, RecursionError):
        raise Refusal(400, "invalid_json", "The body is not valid JSON.") from None
    if not isinstance(asked, dict):
        raise Refusal(400, "invalid_json", "The body is not a JSON object.")
    # A body with few brackets cannot be deep, and most have few.
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH and _is_deeper(asked, MAX_DEPTH):
        raise Refusal(400, "invalid_json", f"The body is nested more than {MAX_DEPTH} levels deep.")
    return asked


async def _bytes(request: Request) -> bytes:
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > MAX_BODY_BYTES:
            raise Refusal(413, "request_too_large", f"The body is larger than {MAX_BODY_BYTES // 1024**2} MB.")
        chunks.append(chunk)
    return b"".join(chunks)


def _is_deeper(value: object, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        level = [each for container in level for each in _values(container) if isinstance(each, dict | list)]
        if not level:
            return False
    return True


def _values(container: object) -> Iterable[object]:
    if isinstance(container, dict):
        return container.values()
    return container if isinstance(container, list) else ()


def _in_64_bits(digits: str) -> int:
    """SGLang answers 500 to the others."""
    number = int(digits)
    if not -(2**63) <= number < 2**63:
        raise ValueError("not a number that 64 bits can be")
    return number


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    """1e999 is JSON, and read as infinity, which cannot be said in JSON to whoever reads it next."""
    number = float(digits)
    if math.isinf(number):
        raise ValueError("not a number that a float can be")
    return number
