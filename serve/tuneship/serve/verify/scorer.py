"""Whom `verify` asks: something that scores given tokens and renders chats."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

Message = dict[str, Any]
Tool = dict[str, Any]
STEP_TOKENS = 1024
"""Of one request. The engine prefills them in one step, for which everybody else's next token waits."""
ALONE_TOKENS = 2048
"""Of one request where nobody waits: on a GPU two small steps take longer than one that is twice as large."""
_BATCH_ROWS = 64


class Scorer(Protocol):
    """A server. `selector` None is the model that it was started with: the base, or the merged one."""

    async def logprobs(self, selector: str | None, rows: list[list[int]], starts: list[int]) -> list[list[float]]:
        """Per row, log p of each token from its start on, given all tokens before it, in nats."""
        ...

    async def tokenize(self, messages: list[Message], tools: list[Tool] | None = None) -> list[int]:
        """The ids that would be prefilled to answer `messages`, where `tools` may be called."""
        ...


def batches(rows: list[list[int]], most: int = STEP_TOKENS) -> list[slice]:
    """Neighbours together, of `most` tokens in all; a longer row goes alone."""
    found, begin, tokens = [], 0, 0
    for index, row in enumerate(rows):
        if index > begin and (index - begin == _BATCH_ROWS or tokens + len(row) > most):
            found.append(slice(begin, index))
            begin, tokens = index, 0
        tokens += len(row)
    return [*found, slice(begin, len(rows))] if rows else []


class ServerFault(Exception):
    """The server failed (5xx) on a request that makes sense."""


Post = Callable[[str, dict[str, Any]], Awaitable[Any]]
"""(path, body) -> the answer's JSON; `ServerFault` on 5xx, a TuneshipError on everything else that is no answer."""


async def prompt_ids(post: Post, model: str, messages: list[Message], tools: list[Tool] | None = None) -> list[int]:
    """What the server prefills for `messages`, where `tools` may be called."""
    chat = {"model": model, "messages": messages} | ({"tools": tools} if tools else {})
    try:
        return list((await post("/v1/tokenize", chat))["tokens"])
    except ServerFault:
        # Upstream gap: SGLang's /v1/tokenize (0.5.17) fails for a model whose tokenizer has no model_max_length: the
        # 10^30 that then stands for it does not fit into its JSON. An answer of one token says the same.
        asked = chat | {"max_tokens": 1, "temperature": 0, "return_token_ids": True}
        return list((await post("/v1/chat/completions", asked))["choices"][0]["prompt_token_ids"])
