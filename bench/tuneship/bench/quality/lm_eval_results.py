"""What lm-eval wrote, as a score and items of ours.

A score of ours is a mean over items, each in 0..1, higher is better: only then do gates, examples and paired
comparisons mean what they say. A figure that is none (BLEU over a corpus, perplexity, an error rate) is refused, never
scaled; beside a metric that is one it can be read in `figures`, under lm-eval's name.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tuneship.bench.quality.evaluate import Item
from tuneship.core.errors import DataError, TuneshipError

_SAME = 1e-6  # lm-eval's mean and ours, of the same items


class Outcome(NamedTuple):
    """One task's result."""

    score: float
    stderr: float | None
    """lm-eval's own; None where it has none."""
    items: list[Item]
    figures: dict[str, float]
    """Every finite metric, named `metric,filter`; `score` is one of them."""


def read_outcome(out: Path, name: str, wanted: str = "") -> Outcome:
    """Read the one result below `out`: task or group `name`, by its first metric or the `wanted` one.

    Raises:
        TuneshipError: there is no result.
        DataError: no score of its own, no such metric, no item, or a metric that is no score.

    """
    results = _read_results(out)
    table = results.get("groups", {}).get(name) or results["results"].get(name) or {}
    figures = {
        key: float(value)
        for key, value in table.items()
        if "," in key and "_stderr," not in key and _is_number(value) and math.isfinite(value)
    }
    if not figures:
        tasks = ", ".join(results["configs"])
        raise DataError(f"lm-eval {name} has no figure of its own", hint=f"name one task of: {tasks}")
    key = _choose(name, figures, wanted)
    metric, _, chosen_filter = key.partition(",")
    samples = _read_samples(out, results["configs"], chosen_filter)
    if not samples:
        raise DataError(f"lm-eval {name} scored no item", hint="is its split empty?")
    rule = DataError(
        f"lm-eval {name}: {key} = {figures[key]:.4g} is no score: a mean over items in 0..1, higher is better",
        hint=f"name a metric that is one (--metric, or options.metric), of: {', '.join(figures)}",
    )
    if results.get("higher_is_better", {}).get(name, {}).get(metric) is False:
        raise rule
    scores = [_score(sample.get(metric)) for sample in samples]
    known = [score for score in scores if score is not None]
    if len(known) < len(scores) or abs(statistics.fmean(known) - figures[key]) > _SAME:
        raise rule
    items = [_item(index, *pair) for index, pair in enumerate(zip(samples, known, strict=True))]
    stderr = table.get(f"{metric}_stderr,{chosen_filter}", math.nan)
    known_stderr = float(stderr) if _is_number(stderr) and math.isfinite(stderr) else None
    return Outcome(figures[key], known_stderr, items, figures)


def _read_results(out: Path) -> dict[str, Any]:
    files = list(out.glob("*/results_*.json"))
    if len(files) != 1:
        raise TuneshipError(f"lm-eval wrote {len(files) or 'no'} results", hint=f"its log: {out.with_name('log')}")
    content: dict[str, Any] = json.loads(files[0].read_text(encoding="utf-8"))
    return content


def _choose(name: str, figures: Mapping[str, float], wanted: str) -> str:
    found = [key for key in figures if not wanted or wanted in {key, key.partition(",")[0]}]
    if not found:
        raise DataError(f"lm-eval {name} has no metric {wanted!r}", hint=f"it has: {', '.join(figures)}")
    return found[0]


def _read_samples(out: Path, tasks: Sequence[str], chosen_filter: str) -> list[dict[str, Any]]:
    """The items under one filter, task by task, in the order of their documents."""
    found: list[dict[str, Any]] = []
    for task in tasks:
        lines: list[dict[str, Any]] = []
        for file in out.glob("*/samples_*.jsonl"):
            if file.name.startswith(f"samples_{task}_20"):  # then comes the date
                lines += [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
        found += sorted((line for line in lines if line["filter"] == chosen_filter), key=lambda line: line["doc_id"])
    return found


def _score(value: Any) -> float | None:
    return float(value) if (_is_number(value) or isinstance(value, bool)) and 0 <= value <= 1 else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _item(index: int, sample: Mapping[str, Any], score: float) -> Item:
    answers = [str(answer) for answer in _flat(sample["resps"])]
    return Item(
        index=index,
        prompt=_prompt(sample),
        reference=str(sample["target"]),
        answer=answers[0] if answers else "",
        score=score,
        error="",
        answers=answers if len(answers) > 1 else [],
    )


def _prompt(sample: Mapping[str, Any]) -> list[dict[str, str]]:
    """The chat that was sent: lm-eval logs it as JSON text inside the first argument."""
    text = next(_flat(sample["arguments"]["gen_args_0"]["arg_0"]), "")
    try:
        chat = json.loads(text)
    except (json.JSONDecodeError, TypeError):
        chat = None
    if isinstance(chat, list) and chat and all(isinstance(turn, dict) for turn in chat):
        return [{"role": str(turn.get("role", "")), "content": _text(turn.get("content", ""))} for turn in chat]
    return [{"role": "user", "content": str(text)}]


def _text(content: Any) -> str:
    return content if isinstance(content, str) else json.dumps(content)


def _flat(value: Any) -> Any:
    """The leaves of nested lists, in order."""
    if isinstance(value, list):
        for inner in value:
            yield from _flat(inner)
    else:
        yield value
