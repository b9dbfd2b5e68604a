"""The scoring verb, `POST /v1/logprobs`: how likely the model finds given tokens. Nothing is generated.

    {"model": "sql", "input_ids": [[1, 5, 9]], "start": [1]}
    -> {"object": "list", "model": "sql", "data": [{"index": 0, "token_logprobs": [-2.1, -0.3]}]}

Natural logarithms, one for each token of a row from `start` on (default 0), given all tokens before it. A row's first
token has none before it: its figure is 0.0. It stands on SGLang's native `/generate`, because its OpenAI endpoints do
not support echoed log-probabilities.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.responses import JSONResponse, Response

from tuneship.core.endpoint import VERSION_HEADER
from tuneship.serve.calls import Call, address
from tuneship.serve.catalog import Entry
from tuneship.serve.joined import Prompts
from tuneship.serve.refusals import Refusal
from tuneship.serve.upstream import Upstream

MAX_ROWS = 256
MAX_TOKENS = 65_536
"""Of one request, over all its rows."""

_TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    input_ids: Annotated[list[Annotated[list[_TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MAX_ROWS)]
    start: list[Annotated[int, Field(ge=0)]] | None = None

    @model_validator(mode="after")
    def _starts_lie_in_their_rows(self) -> _Asked:
        if sum(map(len, self.input_ids)) > MAX_TOKENS:
            raise ValueError(f"more than {MAX_TOKENS} tokens in one request")
        if self.start is not None and len(self.start) != len(self.input_ids):
            raise ValueError("start has not as many entries as input_ids")
        if any(start >= len(ids) for start, ids in zip(self.starts, self.input_ids, strict=True)):
            raise ValueError("a start lies beyond its row")
        return self

    @property
    def starts(self) -> list[int]:
        return self.start or [0] * len(self.input_ids)


async def score(upstream: Upstream, entry: Entry, asked: dict[str, Any]) -> Response:
    """Answer the request `asked` for the model `entry`.

    Raises:
        Refusal: 400 for a key of the engine's own, another unknown key, ids or starts that make no sense; 502 when the
            engine's answer is not about the tokens that were sent; whatever `Upstream.fetch` raises.

    """
    address(asked, entry)
    rows = _read(asked, entry)
    found = await token_logprobs(upstream, entry, rows.input_ids, rows.starts)
    data = [{"index": index, "token_logprobs": figures} for index, figures in enumerate(found)]
    body = {"object": "list", "model": entry.name, "data": data}
    return JSONResponse(body, headers={VERSION_HEADER: entry.version})


async def token_logprobs(
    upstream: Upstream, entry: Entry, rows: list[list[int]], starts: list[int], *, joined: bool = False
) -> list[list[float]]:
    """Per row its figures from its start on, under the model `entry`, for the server's own use.

    With `joined` in one request with what else the server asks at the moment.

    Raises:
        Refusal: 502 as `score`; whatever `Upstream.fetch` raises.

    """
    # SGLang gives no figure for the first token that it is asked about: ask about one before.
    before = [max(start - 1, 0) for start in starts]
    results = await upstream.joined.ask(Prompts(entry.selector, rows, before)) if joined else None
    if results is None:
        answer = await upstream.fetch("/generate", Call(entry, _engine_body(rows, before, entry)))
        return _token_logprobs(lambda: json.loads(answer), rows, starts, entry)
    return _token_logprobs(lambda: results, rows, starts, entry)


def _read(asked: dict[str, Any], entry: Entry) -> _Asked:
    try:
        return _Asked.model_validate(asked)
    except ValidationError as error:
        first = error.errors()[0]
        param = str(first["loc"][0]) if first["loc"] else "input_ids"
        message = f"{'.'.join(map(str, first['loc'])) or param}: {first['msg']}."
        raise Refusal(400, "invalid_request", message, param=param, version=entry.version) from None


def _engine_body(rows: list[list[int]], starts: list[int], entry: Entry) -> bytes:
    body = {
        "input_ids": rows,
        "return_logprob": True,
        "logprob_start_len": starts,
        "sampling_params": {"max_new_tokens": 0, "temperature": 0},
    }
    return json.dumps(body | ({"lora_path": entry.selector} if entry.selector else {})).encode()


def _token_logprobs(
    read: Callable[[], Any], rows: list[list[int]], starts: list[int], entry: Entry
) -> list[list[float]]:
    """Per row its figures from its start on, checked to be about the ids that were sent."""
    try:
        results = read()
        return [
            _of_row(result["meta_info"]["input_token_logprobs"], ids, start)
            for result, ids, start in zip(results, rows, starts, strict=True)
        ]
    except (ValueError, TypeError, LookupError):
        message = "The inference engine's answer has not the log-probabilities asked for."
        raise Refusal(502, "engine_error", message, version=entry.version) from None


def _of_row(scored: list[tuple[float | None, int, str | None]], ids: list[int], start: int) -> list[float]:
    wanted = scored[-(len(ids) - start) :]
    if [token for _, token, *_ in wanted] != ids[start:]:
        raise ValueError("other tokens")
    figures = [figure for figure, *_ in wanted]
    if start == 0:
        figures[0] = 0.0
    if None in figures:
        raise ValueError("a token without a figure")
    return [float(figure or 0.0) for figure in figures]
