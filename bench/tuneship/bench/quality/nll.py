"""Held-out likelihood: how surprised the model is by known answers, in nats per token, through the door's scoring verb.

    result = measure_nll(target, "runs/x/artifacts/adapter-3f.../evidence/reference.jsonl", folder, role="tuned")

Rows are token ids with a mask of those that carry loss (`core/parity.py`), or chats, which the server itself turns into
ids. Of a chat the last answer is scored and, as training learns it, its end of turn: up to the first token after the
answer at which the server stops. Where a server does not say at which tokens it stops, or renders an answer otherwise
once the conversation goes on, the end of turn is left out, which is said.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import httpx

from tuneship.bench.quality.tasks import read_rows
from tuneship.bench.target import Target
from tuneship.core.errors import DataError, EndpointError
from tuneship.core.files import write_atomic
from tuneship.core.parity import ReferenceRow
from tuneship.core.progress import progress, say
from tuneship.core.report import NllResult

_BATCH_ROWS = 16
_BATCH_TOKENS = 32_768
"""Half of what the door takes in one request."""
_TIMEOUT_S = 300
_END_TOKENS = 4
"""An end of turn may be more than its last token: some templates write white space before it."""
_BUSY = {429, 503}
_PAUSES_S = (0.2, 2.0)
"""Before it asks again a server that is busy, or lost its engine's connection: scoring changes nothing, so it may."""


class CannotScore(EndpointError):
    """The server answers, but not this: it has no scoring verb, or refuses these rows."""


class Scored(NamedTuple):
    """One row: its tokens with loss, and the sum of their negative log-probabilities in nats."""

    tokens: int
    nll_sum: float


class _Row(NamedTuple):
    ids: list[int]
    mask: list[int]

    @property
    def start(self) -> int:
        return self.mask.index(1)


def measure_nll(
    target: Target, data: str, folder: Path, limit: int = 200, role: Literal["base", "tuned", "other"] = "other"
) -> NllResult:
    """Score the first `limit` rows of `data`; writes one line a row into `folder`.

    Raises:
        DataError: no rows, a row of another shape, or one whose prompt is no beginning of the whole.
        CannotScore: the server has no scoring verb, or refuses the rows.
        EndpointError: it does not answer, or fails.

    """
    model = target.models[0]
    headers = {"Authorization": f"Bearer {target.key}"} if target.key else {}
    with httpx.Client(base_url=target.url, headers=headers, trust_env=False, timeout=_TIMEOUT_S) as http:
        rows = _reference_rows(Path(data), limit) or _chat_rows(http, model, data, limit)
        scored: list[Scored] = []
        for batch in _batches(rows):
            scored += _score(http, model, batch)
            progress(f"nll {role}", len(scored), len(rows))
    folder.mkdir(parents=True, exist_ok=True)
    name = f"nll-{Path(data).name.split('.')[0]}-{role}.jsonl"
    lines = ({"index": i, "tokens": s.tokens, "nll": s.nll_sum / s.tokens} for i, s in enumerate(scored))
    write_atomic(folder / name, "".join(json.dumps(line) + "\n" for line in lines))
    mean, stderr = clustered_mean(scored)
    tokens = sum(s.tokens for s in scored)
    return NllResult(
        data=data, model=model, role=role, rows=len(rows), tokens=tokens, nll=mean, stderr=stderr, items_file=name
    )


def clustered_mean(scored: Sequence[Scored]) -> tuple[float, float]:
    """Mean over tokens, and its standard error with rows as clusters (ratio estimator); 0.0 for a single row."""
    tokens = sum(s.tokens for s in scored)
    mean = sum(s.nll_sum for s in scored) / tokens
    count = len(scored)
    if count < 2:
        return mean, 0.0
    squares = sum((s.nll_sum - mean * s.tokens) ** 2 for s in scored)
    return mean, math.sqrt(count / (count - 1) * squares) / tokens


def _batches(rows: Sequence[_Row]) -> Iterator[list[_Row]]:
    """Neighbours together, at most `_BATCH_ROWS` of them and `_BATCH_TOKENS` tokens; a longer row goes alone."""
    batch: list[_Row] = []
    for row in rows:
        tokens = sum(len(r.ids) for r in batch) + len(row.ids)
        if batch and (len(batch) == _BATCH_ROWS or tokens > _BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(row)
    yield batch


def _reference_rows(path: Path, limit: int) -> list[_Row]:
    """The rows of a `reference.jsonl`; empty when `path` holds something else."""
    if not path.is_file():  # a glob, or nothing: the chat reader's matter
        return []
    rows = []
    with path.open("rb") as file:  # it may be no text at all, which the chat reader says
        for number, line in enumerate(itertools.islice(file, limit), start=1):
            if number == 1 and b'"input_ids"' not in line:
                return []
            try:
                row = ReferenceRow.model_validate_json(line)
            except ValueError:
                raise DataError(f"{path}:{number} is not a reference row") from None
            mask = [0, *row.loss_mask[1:]]  # nothing stands before the first token: it has no likelihood
            if 1 not in mask or len(mask) != len(row.input_ids):
                raise DataError(f"{path}:{number} has no token with loss")
            rows.append(_Row(row.input_ids, mask))
    return rows


def _chat_rows(http: httpx.Client, model: str, data: str, limit: int) -> list[_Row]:
    rows = []
    chats, ends, without = read_rows(data, limit), _end_token_ids(http, model), 0
    render = _tokenized if _can_tokenize(http, model, chats[0].prompt) else _prefilled
    for row in chats:
        answer = {"role": "assistant", "content": row.reference}
        prompt = render(http, {"model": model, "messages": row.prompt})
        whole = {"model": model, "messages": [*row.prompt, answer], "continue_final_message": True}
        ids = render(http, whole)
        if not prompt or len(ids) <= len(prompt) or ids[: len(prompt)] != prompt:
            raise DataError(f"{row.place}: its prompt's tokens are no beginning of the whole conversation's")
        # As the last message SGLang would render an answer as its user's, not as one that is over.
        going_on = {"model": model, "messages": [*row.prompt, answer, {"role": "user", "content": "Go on."}]}
        end = _end_of_turn(render(http, going_on), ids, ends) if ends else []
        without += not end
        ids = [*ids, *end]
        rows.append(_Row(ids, [0] * len(prompt) + [1] * (len(ids) - len(prompt))))
    if without:
        say(f"{without} of {len(rows)} answers are scored without their end of turn: the server does not tell it")
    return rows


def _end_token_ids(http: httpx.Client, model: str) -> set[int]:
    """The tokens at which the server stops, where it is one of ours and says so."""
    try:
        card = http.get(f"/v1/models/{model}").json()
        return set(card.get("end_token_ids") or ())
    except httpx.HTTPError as error:
        raise EndpointError(f"{http.base_url} does not answer: {error}") from None
    except (ValueError, AttributeError, TypeError):
        return set()


def _end_of_turn(going_on: list[int], answered: list[int], ends: set[int]) -> list[int]:
    """What ends the turn whose tokens are `answered`, by the same conversation `going_on`; empty where that is open."""
    if going_on[: len(answered)] != answered:
        return []
    after = going_on[len(answered) : len(answered) + _END_TOKENS]
    return next((after[: index + 1] for index, token in enumerate(after) if token in ends), [])


def _can_tokenize(http: httpx.Client, model: str, chat: list[dict[str, str]]) -> bool:
    # Upstream gap: SGLang's /v1/tokenize (0.5.17) fails for a model whose tokenizer has no model_max_length, because
    # the 10^30 that then stands for it does not fit into its JSON. True everywhere once it answers for such a model.
    return _send(http, "/v1/tokenize", {"model": model, "messages": chat}).status_code < 500


def _tokenized(http: httpx.Client, chat: dict[str, Any]) -> list[int]:
    tokens: list[int] = _post(http, "/v1/tokenize", chat)["tokens"]
    return tokens


def _prefilled(http: httpx.Client, chat: dict[str, Any]) -> list[int]:
    """What the engine prefills when it is asked to answer; slower, for it does answer, with one token."""
    asked = chat | {"max_tokens": 1, "temperature": 0, "return_token_ids": True}
    tokens: list[int] | None = _post(http, "/v1/chat/completions", asked)["choices"][0].get("prompt_token_ids")
    if tokens is None:
        raise CannotScore(f"{http.base_url} tells nobody how it tokenizes a chat")
    return tokens


def _score(http: httpx.Client, model: str, rows: Sequence[_Row]) -> Iterator[Scored]:
    body = {"model": model, "input_ids": [row.ids for row in rows], "start": [row.start for row in rows]}
    answer = _post(http, "/v1/logprobs", body)
    for row, found in zip(rows, answer["data"], strict=True):
        scored = zip(row.mask[row.start :], found["token_logprobs"], strict=True)
        losses = [-figure for with_loss, figure in scored if with_loss]
        yield Scored(len(losses), math.fsum(losses))


def _post(http: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = _send(http, path, body)
    if response.status_code in {404, 405, 501}:
        raise CannotScore(
            f"{http.base_url} cannot score text: it has no {path}", hint="likelihoods need a server of `tuneship serve`"
        )
    if 400 <= response.status_code < 500:
        raise CannotScore(f"{http.base_url} refused {path} ({response.status_code}): {response.text[:300]}")
    if response.status_code != 200:
        raise EndpointError(f"{path} answered {response.status_code}: {response.text[:300]}")
    found: dict[str, Any] = response.json()
    return found


def _send(http: httpx.Client, path: str, body: dict[str, Any]) -> httpx.Response:
    try:
        for pause_s in _PAUSES_S:
            response = http.post(path, json=body)
            if response.status_code not in _BUSY:
                return response
            time.sleep(pause_s)
        return http.post(path, json=body)
    except httpx.HTTPError as error:
        raise EndpointError(f"{http.base_url} does not answer: {error}") from None
