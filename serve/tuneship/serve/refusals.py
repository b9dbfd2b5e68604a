"""Errors as OpenAI's clients know them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from starlette.responses import Response

from tuneship.core.endpoint import VERSION_HEADER

RETRY_S = 5
"""When to come back to an engine that is not there: it may be starting again."""
_LONGEST_NAME = 100
_LONGEST_MESSAGE = 1000
"""SGLang repeats what it could not read, which may be the whole body."""
_NO_WORDS = "The inference engine refused this request."
_PLACES = re.compile(
    r"\s*File \"[^\"]*\", line \d+.*|(?:\[[\d:]+\] )?(?<![\w:/.])(?:/[\w.+-]+){2,}(?::\d+)?:?", re.DOTALL
)
"""Where in whose source something was refused, to the end of what a traceback says, and paths."""
_NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class Refusal(Exception):
    """A request that gets no answer from the model. `version` is set once it is known which model was meant."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        version: str = "",
        headers: Mapping[str, str] = _NO_HEADERS,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.version = version
        self.headers = headers
        self._error = {"message": message, "type": _type(status), "param": param, "code": code}

    def response(self) -> Response:
        """Render it as the HTTP answer."""
        headers = {**self.headers, **({VERSION_HEADER: self.version} if self.version else {})}
        # Escaped: what a client sent, or an engine said, may hold half a surrogate pair, which no encoding has.
        body = json.dumps({"error": self._error})
        return Response(body, status_code=self.status, headers=headers, media_type="application/json")

    def event(self) -> bytes:
        """Render it as the last event of a stream whose status line is long gone."""
        return f"data: {json.dumps({'error': self._error})}\n\n".encode()


def unknown_model(name: object) -> Refusal:
    """Nothing here has that name, whatever SGLang would have made of it."""
    if name is None:
        message = "The request names no model."
    elif isinstance(name, str):
        shown = name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..."
        message = f"The model {shown!r} does not exist."
    else:
        message = "The model must be named by a string."
    return Refusal(404, "model_not_found", message, param="model")


def engine_unavailable(version: str = "") -> Refusal:
    """The engine does not answer, or stopped in the middle."""
    headers = {"Retry-After": str(RETRY_S)}
    message = "The inference engine is not available."
    return Refusal(503, "engine_unavailable", message, version=version, headers=headers)


class UpstreamError(NamedTuple):
    """What the engine said when it refused. Its own faults are not passed on: they may name paths."""

    status: int
    body: bytes

    def refusal(self, version: str) -> Refusal:
        """Say it in the same words and OpenAI's form."""
        if self.status == 503:
            return engine_unavailable(version)
        if self.status >= 500:
            return Refusal(502, "engine_error", "The inference engine failed on this request.", version=version)
        return Refusal(self.status, "invalid_request", _message(self.body), version=version)


def _type(status: int) -> str:
    return "server_error" if status >= 500 else "invalid_request_error"


def _message(body: bytes) -> str:
    try:
        said: Any = json.loads(body)
    except ValueError:
        return _NO_WORDS
    nested = said.get("error") if isinstance(said, dict) else None
    message = (nested if isinstance(nested, dict) else said).get("message") if isinstance(said, dict) else None
    return _PLACES.sub("...", str(message))[:_LONGEST_MESSAGE] if message else _NO_WORDS
