"""`report.json`: what was measured, in the words of SGLang's own benchmark where it has one. Times in milliseconds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tuneship.core import versioned
from tuneship.core.errors import EndpointError
from tuneship.core.files import sha256_text, write_atomic
from tuneship.core.parity import Parity

SCHEMA = 1


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, populate_by_name=True)


class Percentiles(_Record):
    """Of one latency over one window, in milliseconds; NaN-free: absent as None where nothing completed."""

    p50: float
    p90: float
    p95: float
    p99: float
    mean: float


class ClientHealth(_Record):
    """Whether the load generator itself was the bottleneck."""

    lag_p99_ms: float
    """How late requests left against the schedule, and how late the event loop woke, whichever is worse."""
    limit_ms: float = 0.0
    """The lag beyond which the figures are not to be believed."""
    processes: int = 1
    cpu_s: float = 0.0
    """Processor time that the client spent, all its processes together."""
    valid: bool


class Block(_Record):
    """A stretch of a level's steady window, the unit of `compare`. Latencies are medians over the block's requests."""

    start_s: float
    requests: int
    ttft_ms: float | None
    tpot_ms: float | None
    itl_ms: float | None
    e2e_ms: float | None
    output_tokens_per_s: float


class GpuUse(_Record):
    """What NVML saw on one GPU during a level."""

    name: str
    memory_peak_bytes: int
    power_mean_w: float
    energy_j: float


Arrivals = Literal["constant", "poisson", "trace", "closed"]


class LoadResult(_Record):
    """One load level against one endpoint. Figures are of requests sent within `window_s`, the steady window."""

    workload: str
    model: str
    arrivals: Arrivals
    """`closed`: a fixed number of requests in flight; the others are open loops on an absolute schedule."""
    rate: float
    """Requests per second offered; 0 in a closed loop."""
    concurrency: int = 0
    """Requests in flight in a closed loop; 0 in an open one."""
    requests: int
    """Sent within the window."""
    completed: int
    window_s: tuple[float, float] | None = None
    """Seconds from the level's first send; what was sent before (warm-up) or after it counts in no figure."""
    duration_s: float
    input_tokens: int
    output_tokens: int
    ttft_ms: Percentiles | None
    tpot_ms: Percentiles | None
    itl_ms: Percentiles | None
    e2e_ms: Percentiles | None
    ttft_from_schedule_ms: Percentiles | None = None
    e2e_from_schedule_ms: Percentiles | None = None
    """From the scheduled time instead of the send: without coordinated omission even if the client was late."""
    output_tokens_per_s: float
    requests_per_s: float = 0.0
    """Completed."""
    slo_ms: dict[str, float] = {}
    """The objectives that goodput was counted under: {"ttft": 500, "tpot": 50}."""
    goodput: float | None = None
    """Share, in 0..1, of the requests *sent* that completed within every objective."""
    errors: dict[str, int] = {}
    client: ClientHealth
    engine: dict[str, float] = {}
    """The engine's own `/metrics` over the level, under the engine's names."""
    gpus: list[GpuUse] = []
    per_adapter: dict[str, dict[str, float]] = {}
    blocks: list[Block] = []
    samples: dict[str, list[float]] = {}
    """Sorted latency samples for the plots, thinned to at most 512 a metric: {metric: milliseconds}."""
    timeline: list[tuple[float, float, float]] = []
    """(sent at, seconds; TTFT ms; E2E ms) of completed requests, at most 512 of them."""

    @property
    def offered(self) -> str:
        """The load in a word: `4/s`, `16 in flight`, `trace 2.1/s`."""
        if self.arrivals == "closed":
            return f"{self.concurrency} in flight"
        return f"{'trace ' if self.arrivals == 'trace' else ''}{self.rate:.4g}/s"


class Knee(_Record):
    """Where a sweep found the server's limit."""

    rate: float
    """The highest rate, in requests per second, that it sustained."""
    beyond: float | None
    """The lowest rate that it did not; None when none was found below the client's own limit."""
    reason: str
    """What gave way beyond it, such as `goodput 0.71 < 0.95` or `throughput 3.1/s of 8/s offered`."""


class EvalResult(_Record):
    """One task, one model. `score` is the mean over items in 0..1, `stderr` its standard error."""

    task: str
    data: str
    model: str
    role: Literal["base", "tuned", "other"] = "other"
    items: int
    samples: int = 1
    """Answers an item; an item's score is their mean."""
    score: float
    stderr: float
    items_file: str
    errors: int = 0
    extra: dict[str, float] = {}
    """Further figures of the task: `pass@k`, or what lm-eval calls its metrics."""


class NllResult(_Record):
    """Held-out text scored by teacher forcing: `nll` is the mean over answer tokens, in nats per token."""

    data: str
    model: str
    role: Literal["base", "tuned", "other"] = "other"
    rows: int
    tokens: int
    nll: float
    stderr: float
    """Over rows as clusters: tokens of one row are not independent."""
    items_file: str

    @property
    def perplexity(self) -> float:
        """Of the answers' tokens: exp(nll)."""
        return math.exp(self.nll) if self.nll < 700 else math.inf


class Comparison(_Record):
    """One metric of B against A. `ratio` is b / a; what one side does not have is None, and `reason` says why."""

    metric: str
    a: float | None
    b: float | None
    ratio: float | None
    unit: Literal["ratio", "points", "nats"] = "ratio"
    """Of `worse_by`, `ci`, `margin` and `detectable`."""
    worse_by: float | None = None
    """How much worse B is (negative: better), in `unit`; a ratio of 1.03 in latency is 0.03."""
    ci: tuple[float, float] | None = None
    """Confidence interval of `worse_by`."""
    margin: float | None = None
    p: float | None = None
    """One-sided, of "B is no worse than A", after Holm's correction over all declared metrics."""
    pairs: int = 0
    """Pairs of blocks, or items, that the verdict rests on."""
    verdict: Literal["regressed", "no worse than the margin", "cannot tell"]
    reason: str = ""
    detectable: float | None = None
    """The smallest `worse_by` that this many pairs would have found with a power of 0.8."""
    next_step: str = ""
    """What to run to decide, where the verdict is `cannot tell`."""


class Testbed(_Record):
    """Where it was measured. Two reports are comparable when their `digest` agrees."""

    gpu: str
    cpu: str
    driver: str
    versions: dict[str, str]
    flags: list[str]
    digest: str = ""

    @classmethod
    def build(cls, *, gpu: str, cpu: str, driver: str, versions: dict[str, str], flags: list[str]) -> Testbed:
        """A testbed with its digest over all of it."""
        parts = {"gpu": gpu, "cpu": cpu, "driver": driver, "versions": versions, "flags": flags}
        digest = sha256_text(json.dumps(parts, sort_keys=True))[:16]
        return cls(gpu=gpu, cpu=cpu, driver=driver, versions=versions, flags=flags, digest=digest)


class LossPoint(_Record):
    """One logged training step; loss in nats per answer token."""

    step: int
    loss: float
    tokens_per_s: float = 0.0
    learning_rate: float = 0.0


class Report(_Record):
    """Everything one run measured."""

    schema_: int = Field(default=SCHEMA, alias="schema")
    name: str
    created_at: str
    testbed: Testbed
    endpoint: dict[str, Any] = {}
    training: list[LossPoint] = []
    load: list[LoadResult] = []
    knee: Knee | None = None
    eval: list[EvalResult] = []
    nll: list[NllResult] = []
    parity: Parity | None = None
    comparison: list[Comparison] = []
    provenance: dict[str, str] = {}
    """How to get it again: the command, the recipe's digest, artifact ids."""


def write_report(report: Report, path: Path) -> None:
    """Write `report.json`."""
    write_atomic(path, report.model_dump_json(indent=1, by_alias=True))


def read_report(path: Path) -> Report:
    """Read `report.json`.

    Raises:
        EndpointError: no such file, not a report, or of a newer schema.

    """
    try:
        text = path.read_bytes()
    except OSError:
        raise EndpointError(f"no report at {path}", hint="`tuneship up` and `tuneship bench load` write one") from None
    return versioned.parse(Report, text, path, SCHEMA, EndpointError)
