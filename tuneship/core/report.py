"""`report.json`: what was measured, in the words of SGLang's own benchmark where it has one. Times in milliseconds."""

from __future__ import annotations

import json
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
    valid: bool


class LoadResult(_Record):
    """One load level against one endpoint."""

    workload: str
    model: str
    arrivals: Literal["constant", "poisson"]
    rate: float
    """Requests per second offered."""
    requests: int
    completed: int
    duration_s: float
    input_tokens: int
    output_tokens: int
    ttft_ms: Percentiles | None
    tpot_ms: Percentiles | None
    itl_ms: Percentiles | None
    e2e_ms: Percentiles | None
    output_tokens_per_s: float
    goodput: float | None = None
    errors: dict[str, int] = {}
    client: ClientHealth
    per_adapter: dict[str, dict[str, float]] = {}
    samples: dict[str, list[float]] = {}
    """Sorted latency samples for the plots, thinned to at most 512 a metric: {metric: milliseconds}."""


class EvalResult(_Record):
    """One task, one model. `score` is the mean over items in 0..1, `stderr` its standard error."""

    task: str
    data: str
    model: str
    role: Literal["base", "tuned", "other"] = "other"
    items: int
    score: float
    stderr: float
    items_file: str
    errors: int = 0


class Comparison(_Record):
    """One metric of B against A. `ratio` is b / a; what one side does not have is None, and `reason` says why."""

    metric: str
    a: float | None
    b: float | None
    ratio: float | None
    ci: tuple[float, float] | None = None
    p: float | None = None
    verdict: Literal["regressed", "no worse than the margin", "cannot tell"]
    reason: str = ""
    detectable: float | None = None


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
    eval: list[EvalResult] = []
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
