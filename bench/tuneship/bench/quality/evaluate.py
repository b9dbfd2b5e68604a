"""Task quality: ask every row's question greedily, score the answers, keep each of them.

    result = evaluate(target, Task("json-fields", "invoice.heldout.jsonl", limit=200), folder, role="tuned")

A row whose request still fails after the client's retries is an error: it scores 0 and is counted. When the server
answers nothing at all, or stops answering, that is no low score but an `EndpointError`.
"""

from __future__ import annotations

import asyncio
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import httpx
import openai

from tuneship.bench.quality.tasks import Row, Scorer, find_scorer, read_rows
from tuneship.bench.target import Target
from tuneship.core.errors import DataError, EndpointError
from tuneship.core.files import write_atomic
from tuneship.core.progress import progress
from tuneship.core.report import EvalResult

Role = Literal["base", "tuned", "other"]

_CONCURRENCY = 8
_RETRIES = 2
_ITEM_TIMEOUT_S = 300  # with its retries; a small CPU may need minutes for eight answers
_GIVE_UP_AFTER = _CONCURRENCY  # failures in a row


class Task(NamedTuple):
    """Which rows, scored how."""

    scorer: str
    data: str
    limit: int = 200
    max_tokens: int = 128

    @property
    def label(self) -> str:
        """How progress and files name it."""
        return f"{self.scorer}-{Path(self.data).name.split('.')[0]}"


@dataclass(frozen=True)
class Item:
    """One line of the items file."""

    index: int
    prompt: list[dict[str, str]]
    reference: str
    answer: str
    score: float
    error: str


class _Answer(NamedTuple):
    text: str
    error: str = ""


def evaluate(target: Target, task: Task, folder: Path, role: Role = "other") -> EvalResult:
    """Run `task` against the first of `target`'s models; writes `items-<task>-<role>.jsonl` into `folder`.

    Raises:
        DataError: no such task, or rows whose own reference cannot be scored.
        EndpointError: every request failed, or many in a row.

    """
    scorer = find_scorer(task.scorer)
    rows = read_rows(task.data, task.limit)
    _check_references(rows, scorer)
    model = target.models[0]
    answers = asyncio.run(_ask_all(target, model, rows, task, f"eval {task.label} {role}"))
    items = [_item(index, row, answer, scorer) for index, (row, answer) in enumerate(zip(rows, answers, strict=True))]
    folder.mkdir(parents=True, exist_ok=True)
    name = _free_name(folder, f"items-{task.label}-{role}")
    write_atomic(folder / name, "".join(json.dumps(asdict(item)) + "\n" for item in items))
    scores = [item.score for item in items]
    return EvalResult(
        task=task.scorer,
        data=task.data,
        model=model,
        role=role,
        items=len(items),
        score=statistics.fmean(scores),
        stderr=standard_error(scores),
        items_file=name,
        errors=sum(bool(item.error) for item in items),
    )


def standard_error(scores: Sequence[float]) -> float:
    """Of the mean, with the sample's own deviation; 0.0 for a single score."""
    return statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else 0.0


def read_items(path: Path) -> list[Item]:
    """The items that `evaluate` wrote."""
    return [Item(**json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _check_references(rows: Sequence[Row], scorer: Scorer) -> None:
    """A reference that would not score 1 against itself can only mislead: better known before the model is asked."""
    for row in rows:
        try:
            score = scorer(row.reference, row.reference, row.extra)
        except ValueError as error:
            raise DataError(f"{row.place}: {error}") from None
        if score != 1:
            raise DataError(f"{row.place}: its own reference scores {score:g}, not 1")


async def _ask_all(target: Target, model: str, rows: Sequence[Row], task: Task, label: str) -> list[_Answer]:
    """Answers in the order of `rows`, `_CONCURRENCY` requests at a time."""
    answers: list[_Answer] = [_Answer("")] * len(rows)
    queue = iter(enumerate(rows))
    ended = failed_in_a_row = 0

    async def worker(client: openai.AsyncOpenAI) -> None:
        nonlocal ended, failed_in_a_row
        for index, row in queue:
            answers[index] = answer = await _ask(client, model, row, task.max_tokens)
            ended += 1
            failed_in_a_row = failed_in_a_row + 1 if answer.error else 0
            progress(label, ended, len(rows))
            if failed_in_a_row >= min(_GIVE_UP_AFTER, len(rows)):
                raise EndpointError(
                    f"{label}: {failed_in_a_row} requests in a row to {target.url} failed: {answer.error}",
                    hint="is the server still running? its log tells",
                )

    async with _client(target) as client:
        workers = [asyncio.create_task(worker(client)) for _ in range(_CONCURRENCY)]
        try:
            await asyncio.gather(*workers)
        finally:
            for task_ in workers:
                task_.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
    return answers


def _client(target: Target) -> openai.AsyncOpenAI:
    # No proxy from the environment: what is measured is the server itself.
    http = httpx.AsyncClient(trust_env=False, timeout=_ITEM_TIMEOUT_S)
    return openai.AsyncOpenAI(
        base_url=target.api_url, api_key=target.key or "none", http_client=http, max_retries=_RETRIES
    )


async def _ask(client: openai.AsyncOpenAI, model: str, row: Row, max_tokens: int) -> _Answer:
    try:
        async with asyncio.timeout(_ITEM_TIMEOUT_S):
            completion = await client.chat.completions.create(
                model=model,
                messages=cast("Any", row.prompt),  # roles are the file's: the server judges them
                temperature=0,
                max_tokens=max_tokens,
            )
        return _Answer(completion.choices[0].message.content or "")
    except TimeoutError:
        return _Answer("", f"timeout: no answer in {_ITEM_TIMEOUT_S} s")
    except openai.OpenAIError as error:
        return _Answer("", f"{type(error).__name__}: {error}"[:500])
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        return _Answer("", f"not a chat completion: {type(error).__name__}: {error}"[:500])


def _item(index: int, row: Row, answer: _Answer, scorer: Scorer) -> Item:
    score = 0.0 if answer.error else scorer(answer.text, row.reference, row.extra)
    return Item(index, row.prompt, row.reference, answer.text, score, answer.error)


def _free_name(folder: Path, stem: str) -> str:
    """`<stem>.jsonl`, numbered when two tasks of one run share a name."""
    taken = len(list(folder.glob(f"{stem}*.jsonl")))
    return f"{stem}-{taken + 1}.jsonl" if taken else f"{stem}.jsonl"
