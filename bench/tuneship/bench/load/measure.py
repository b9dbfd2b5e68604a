"""The load bench of one endpoint: a warm-up that does not count, then one level after the other."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import aiohttp
import uvloop

from tuneship.bench.load import drive as client
from tuneship.bench.load import metrics, workload
from tuneship.bench.load.stream import TIMEOUT, RequestRecord
from tuneship.bench.target import Target
from tuneship.core.errors import EndpointError
from tuneship.core.progress import progress, say
from tuneship.core.report import LoadResult

_WARM_UP_REQUESTS = 4
_WARM_UP_S = 300  # a server's first request may compile kernels


class LoadPlan(NamedTuple):
    """Which load: rates in requests per second, one level each."""

    rates: tuple[float, ...]
    duration_s: float
    arrivals: Literal["constant", "poisson"]
    input_tokens: int
    output_tokens: int
    seed: int = 0
    drain_s: float = 60
    """How long after the last send answers are waited for; what is missing then counts as a timeout."""


def run_load(target: Target, plan: LoadPlan) -> list[LoadResult]:
    """Measure every level of `plan`, in order.

    Raises:
        EndpointError: the warm-up, or a whole level, got no answer; names the reason.

    """
    return uvloop.run(_run(target, plan))


async def _run(target: Target, plan: LoadPlan) -> list[LoadResult]:
    salt = secrets.token_hex(4)
    async with client.connect(target.key) as session:
        await _warm_up(session, target, plan, salt)
        return [await _level(session, target, plan, rate, salt) for rate in plan.rates]


async def _warm_up(session: aiohttp.ClientSession, target: Target, plan: LoadPlan, salt: str) -> None:
    say(f"warming up {target.model} at {target.url}")
    requests = [
        workload.Request(
            0.0,
            model,
            workload.ask(workload.make_prompt(plan.input_tokens, f"warm-up {index}", salt)),
            plan.output_tokens,
        )
        for index, model in enumerate(target.models * _WARM_UP_REQUESTS)
    ]
    recording = await client.drive(session, target.url, requests, drain_s=_WARM_UP_S)
    _refuse_silence(target, "the warm-up", recording.records)


async def _level(session: aiohttp.ClientSession, target: Target, plan: LoadPlan, rate: float, salt: str) -> LoadResult:
    label = f"load {rate:g}/s"
    requests = _requests(target, plan, rate, salt)
    drain_s = plan.duration_s + plan.drain_s - requests[-1].at_s
    recording = await client.drive(session, target.url, requests, drain_s=drain_s, watch=partial(_show, label))
    _show(label, plan.duration_s, recording.records)
    _refuse_silence(target, label, recording.records)
    return metrics.summarise(
        recording,
        workload=workload.describe(plan.input_tokens, plan.output_tokens),
        model=target.model,
        arrivals=plan.arrivals,
        rate=rate,
    )


def _requests(target: Target, plan: LoadPlan, rate: float, salt: str) -> list[workload.Request]:
    return workload.plan(
        rate=rate,
        duration_s=plan.duration_s,
        arrivals=plan.arrivals,
        input_tokens=plan.input_tokens,
        output_tokens=plan.output_tokens,
        models=target.models,
        seed=plan.seed,
        salt=salt,
    )


def _show(label: str, now_s: float, records: Sequence[RequestRecord]) -> None:
    sent = sum(record.scheduled_s <= now_s for record in records)
    ended = [record for record in records if record.end_s]
    failed = sum(bool(record.error) for record in ended)
    progress(label, len(ended), len(records), f"{sent} sent" + (f", {failed} failed" if failed else ""))


def _refuse_silence(target: Target, what: str, records: Sequence[RequestRecord]) -> None:
    """A level without one answer is no measurement."""
    if any(not record.error for record in records):
        return
    last = records[-1]
    gone = last.error in {TIMEOUT, "connection", "stream_closed"}
    raise EndpointError(
        f"{what}: none of {len(records)} requests to {target.url} completed: {last.error}: {last.detail}",
        hint="is the server still running, and can it keep up with this rate? its log tells" if gone else "",
    )
