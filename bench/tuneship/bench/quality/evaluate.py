"""Task quality: ask every row's question, once or k times, score the answers, keep each of them.

    result = evaluate(target, Task("json-fields", "invoice.heldout.jsonl", limit=200), folder, role="tuned")

An eval that was cut off goes on where it stopped (`partial.py`).
A row whose request still fails after the client's retries is an error: it scores 0 and is counted. When the server
answers nothing at all, or stops answering, that is no low score but an `EndpointError`.
"""

from __future__ import annotations

import asyncio
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, cast

import httpx
import openai

from tuneship.bench.quality.partial import Key, Partial
from tuneship.bench.quality.tasks import Row, Scorer, find_scorer, read_rows
from tuneship.bench.target import Target
from tuneship.core.errors import DataError, EndpointError
from tuneship.core.files import sha256_text, write_atomic
from tuneship.core.progress import progress
from tuneship.core.recipe_bench import LM_EVAL_PREFIX
from tuneship.core.report import EvalResult

Role = Literal["base", "tuned", "other"]

_MAX_TOKENS = 128
_CONCURRENCY = 8
_RETRIES = 2
_ITEM_TIMEOUT_S = 300  # with its retries; a small CPU may need minutes for eight answers
_GIVE_UP_AFTER = _CONCURRENCY  # failures in a row


class Task(NamedTuple):
    """Which rows, scored how."""

    scorer: str
    data: str
    limit: int = 200
    max_tokens: int = 0
    """Of one answer; 0: 128, and for lm-eval's tasks what they say themselves."""
    samples: int = 1
    """Answers an item; its score is their mean."""
    temperature: float = 0.0
    seed: int = 0
    """Of the first sample; the next has the next. Not every server heeds it."""
    options: Mapping[str, Any] = MappingProxyType({})
    """The scorer's own; a row's key of the same name wins."""

    @property
    def label(self) -> str:
        """How progress and files name it."""
        scorer = "own" if self.scorer.startswith("python:") else self.scorer
        return f"{scorer}-{Path(self.data).name.split('.')[0]}"


@dataclass(frozen=True)
class Item:
    """One line of the items file."""

    index: int
    prompt: list[dict[str, str]]
    reference: str
    answer: str
    score: float
    error: str
    """Of any of its samples."""
    answers: list[str] = field(default_factory=list)
    """All samples, where there is more than one; `answer` is the first."""
    scores: list[float] = field(default_factory=list)

    @property
    def question(self) -> tuple[list[dict[str, str]], str]:
        """What makes two answers comparable: prompt and reference."""
        return self.prompt, self.reference


class _Answer(NamedTuple):
    text: str
    error: str = ""


def evaluate(target: Target, task: Task, folder: Path, role: Role = "other") -> EvalResult:
    """Run `task` against the first of `target`'s models; writes `items-<task>-<role>.jsonl` into `folder`.

    Raises:
        DataError: no such task, or rows whose own reference cannot be scored.
        EndpointError: every request failed, or many in a row.

    """
    if task.scorer.startswith(LM_EVAL_PREFIX):
        from tuneship.bench.quality.lm_eval import evaluate_lm_eval  # noqa: PLC0415 - which needs this module

        return evaluate_lm_eval(target, task, folder, role)
    task = task._replace(max_tokens=task.max_tokens or _MAX_TOKENS)
    scorer = find_scorer(task.scorer)
    rows = [row._replace(extra={**task.options, **row.extra}) for row in read_rows(task.data, task.limit)]
    _check_references(rows, scorer)
    model = target.models[0]
    name = free_name(folder, f"items-{task.label}-{role}")
    partial = Partial(folder / f"{name}.partial", _asked(model, rows, task))
    answers = asyncio.run(_ask_all(target, model, rows, task, partial, f"eval {task.label} {role}"))
    items = [
        _item(index, row, [answers[index, sample] for sample in range(task.samples)], scorer)
        for index, row in enumerate(rows)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / name, "".join(json.dumps(asdict(item)) + "\n" for item in items))
    partial.remove()
    scores = [item.score for item in items]
    return EvalResult(
        task=task.scorer,
        data=task.data,
        model=model,
        role=role,
        items=len(items),
        samples=task.samples,
        score=statistics.fmean(scores),
        stderr=standard_error(scores),
        items_file=name,
        errors=sum(bool(item.error) for item in items),
        extra={f"pass@{task.samples}": statistics.fmean(1.0 in item.scores for item in items)}
        if task.samples > 1
        else {},
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


def _asked(model: str, rows: Sequence[Row], task: Task) -> dict[str, Any]:
    """What makes two answers interchangeable: all but the scoring."""
    prompts = json.dumps([[row.prompt, row.reference] for row in rows])
    sampling = {"samples": task.samples, "temperature": task.temperature, "seed": task.seed}
    return {"model": model, "rows": sha256_text(prompts), "task": task.scorer, "max_tokens": task.max_tokens} | sampling


async def _ask_all(
    target: Target, model: str, rows: Sequence[Row], task: Task, partial: Partial, label: str
) -> dict[Key, _Answer]:
    """An answer for every row and sample, `_CONCURRENCY` requests at a time."""
    answers: dict[Key, _Answer] = {key: _Answer(text) for key, text in partial.answers.items()}
    keys = [(row, sample) for row in range(len(rows)) for sample in range(task.samples)]
    missing = [key for key in keys if key not in answers]
    queue = iter(missing)
    failed_in_a_row = 0

    async def worker(client: openai.AsyncOpenAI) -> None:
        nonlocal failed_in_a_row
        for key in queue:
            answers[key] = answer = await _ask(client, model, rows[key[0]], task, key[1])
            if not answer.error:
                partial.add(key, answer.text)
            failed_in_a_row = failed_in_a_row + 1 if answer.error else 0
            progress(label, len(answers), len(keys))
            if failed_in_a_row >= min(_GIVE_UP_AFTER, len(missing)):
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


async def _ask(client: openai.AsyncOpenAI, model: str, row: Row, task: Task, sample: int) -> _Answer:
    try:
        async with asyncio.timeout(_ITEM_TIMEOUT_S):
            completion = await client.chat.completions.create(
                model=model,
                messages=cast("Any", row.prompt),  # roles are the file's: the server judges them
                temperature=task.temperature,
                max_tokens=task.max_tokens,
                seed=task.seed + sample if task.temperature else openai.omit,
            )
        return _Answer(completion.choices[0].message.content or "")
    except TimeoutError:
        return _Answer("", f"timeout: no answer in {_ITEM_TIMEOUT_S} s")
    except openai.OpenAIError as error:
        return _Answer("", f"{type(error).__name__}: {error}"[:500])
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        return _Answer("", f"not a chat completion: {type(error).__name__}: {error}"[:500])


def _item(index: int, row: Row, answers: Sequence[_Answer], scorer: Scorer) -> Item:
    scores = [0.0 if answer.error else scorer(answer.text, row.reference, row.extra) for answer in answers]
    error = next((answer.error for answer in answers if answer.error), "")
    item = Item(index, row.prompt, row.reference, answers[0].text, statistics.fmean(scores), error)
    return replace(item, answers=[answer.text for answer in answers], scores=scores) if len(answers) > 1 else item


def free_name(folder: Path, stem: str) -> str:
    """`<stem>.jsonl`, numbered when two tasks of one run share a name."""
    taken = len(list(folder.glob(f"{stem}*.jsonl")))
    return f"{stem}-{taken + 1}.jsonl" if taken else f"{stem}.jsonl"
