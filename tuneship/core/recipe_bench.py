"""The part of a recipe that says what is measured: [bench.load], [[bench.eval]], [bench.gate]."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tuneship.core.recipe_section import Count, Section, Share


class BenchSlo(Section):
    """Latency objectives in milliseconds; goodput is the share of requests sent that met all that are given."""

    ttft_ms: Annotated[float, Field(ge=0)] = 0
    """From the send to the first token. 0: no objective."""
    tpot_ms: Annotated[float, Field(ge=0)] = 0
    """Per token after the first, the mean of one answer. 0: no objective."""
    e2e_ms: Annotated[float, Field(ge=0)] = 0
    """From the send to the last token. 0: no objective."""


class BenchLoad(Section):
    """The load: levels of an open loop (`rates`, or a `trace`), then levels of a closed one (`concurrency`)."""

    rates: Literal["sweep"] | tuple[Annotated[float, Field(gt=0)], ...] = (1, 4, 16)
    """Requests per second, or `sweep`: higher and higher until the knee is found."""
    arrivals: Literal["poisson", "constant"] = "poisson"
    """Of `rates`: at random, as independent clients come, or evenly spaced."""
    trace: str = ""
    """A JSONL of recorded arrivals (`timestamp` in ms, and lengths or messages), replayed instead of `rates`."""
    concurrency: tuple[Count, ...] = ()
    """Requests in flight; one level for each number. Empty: none."""
    duration_s: Annotated[float, Field(gt=0)] = 30
    """Of each level."""
    warm_up_s: Annotated[float, Field(ge=0)] = 0
    """At the start of each level: sent, and counted in no figure."""
    workload: Annotated[str, Field(min_length=1)] = "fixed"
    """`fixed`, `shared-prefix`, `heldout` (data.heldout's prompts), or a JSONL of prompts or conversations."""
    input_tokens: Count = 128
    """Words of a made-up prompt, most of them one token; the chat template comes on top."""
    output_tokens: Count = 64
    """Of one answer."""
    prefix_tokens: Annotated[int, Field(ge=0)] = 0
    """Of `input_tokens`, shared by all prompts of a `shared-prefix` workload."""
    adapters: Literal["uniform", "zipf"] | dict[str, Annotated[float, Field(gt=0)]] = "uniform"
    """How requests are spread over the models: evenly, by Zipf's law, or by weight."""
    processes: Count = 1
    """Of the client, when one core is not enough."""
    slo: BenchSlo = BenchSlo()

    @model_validator(mode="after")
    def _prefix_fits_the_prompt(self) -> BenchLoad:
        if self.prefix_tokens >= self.input_tokens:
            raise ValueError(f"prefix_tokens = {self.prefix_tokens} is not below input_tokens = {self.input_tokens}")
        if self.workload == "shared-prefix" and not self.prefix_tokens:
            raise ValueError("workload = 'shared-prefix' needs prefix_tokens")
        return self


NAMED_WORKLOADS = ("fixed", "shared-prefix", "heldout")
LM_EVAL_PREFIX = "lm-eval:"
SCORERS = ("exact", "normalised", "choice", "regex", "numeric", "rouge-l", "json-fields", "json-schema", "sql")


class BenchEval(Section):
    """One quality task: a scorer over rows whose last message is the reference answer."""

    task: Annotated[str, Field(min_length=1)]
    """A scorer, `python:FILE.py:function` (answer, reference, row -> 0..1), or lm-eval's: `lm-eval:NAME`, or
    `lm-eval:FILE.yaml` for a task of one's own.
    """
    data: str = ""
    """Every task needs it but lm-eval's, which names its own."""
    options: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """The scorer's own, such as {pattern = "..."}; a `schema` that is no JSON object is a path, as `data` is."""
    limit: Count = 200
    """The first so many rows."""
    max_tokens: Annotated[int, Field(ge=0)] = 0
    """Of one answer. 0: 128; for lm-eval's tasks what they say themselves."""
    samples: Count = 1
    """Answers to each row; its score is their mean."""
    temperature: Annotated[float, Field(ge=0)] = 0
    """Above 0 where `samples` is above 1, or all of them are the same. 0: greedy, or what lm-eval's task says."""

    @model_validator(mode="after")
    def _known_task_and_real_samples(self) -> BenchEval:
        if self.task.startswith(LM_EVAL_PREFIX):
            return self._names_what_lm_eval_takes()
        if self.task not in SCORERS and not self.task.startswith("python:"):
            raise ValueError(
                f"task = {self.task!r} is none of: {', '.join(SCORERS)}, python:FILE.py:function, lm-eval:NAME"
            )
        if not self.data:
            raise ValueError(f"task = {self.task!r} needs data = a file of rows")
        if self.samples > 1 and not self.temperature:
            raise ValueError(f"samples = {self.samples} needs a temperature above 0")
        return self

    def _names_what_lm_eval_takes(self) -> BenchEval:
        if self.task == LM_EVAL_PREFIX:
            raise ValueError(f"task = {self.task!r} names no task")
        if self.data:
            raise ValueError(f"data = {self.data!r}, but task = {self.task!r} names its own")
        if self.samples > 1:
            raise ValueError(f"samples = {self.samples}, but task = {self.task!r} has its own number (`repeats`)")
        return self


class BenchGate(Section):
    """What counts as a regression."""

    baseline: str = ""
    """The report.json to be no worse than; empty: nothing is gated."""
    latency_margin: Share = 0.05
    """Share by which latencies may grow and throughput may fall."""
    quality_margin: Share = 0.02
    """Points of score, in 0..1."""
    nll_margin: Annotated[float, Field(gt=0)] = 0.02
    """Nats per token of held-out text."""
    alpha: Share = 0.05
    """Chance of a false alarm over all metrics together."""


class Bench(Section):
    """What is measured once the model is served."""

    load: BenchLoad = BenchLoad()
    eval: tuple[BenchEval, ...] = ()
    gate: BenchGate = BenchGate()
