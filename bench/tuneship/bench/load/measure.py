"""The load bench of one endpoint: a warm-up that does not count, then one level after the other."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from tuneship.bench.load import engine_metrics, gpu, metrics, processes, sweep
from tuneship.bench.load.arrivals import Arrival, read_trace, schedule
from tuneship.bench.load.drive import Watcher
from tuneship.bench.load.prompts import Prompts, source
from tuneship.bench.load.stream import TIMEOUT, RequestRecord
from tuneship.bench.load.workload import Mix, Request, plan, weigh
from tuneship.bench.target import Target
from tuneship.core.errors import EndpointError
from tuneship.core.progress import progress, say
from tuneship.core.report import Arrivals, Knee, LoadResult

_WARM_UP_REQUESTS = 4
_WARM_UP_S = 300  # a server's first request may compile kernels
_MOST_REQUESTS = 200_000


class LoadPlan(NamedTuple):
    """Which load: open levels, by rate in requests per second or from a trace, then closed ones by concurrency."""

    rates: tuple[float, ...] | Literal["sweep"]
    duration_s: float
    """Of a level's steady window, after `warm_up_s`; a longer trace is cut there."""
    arrivals: Literal["constant", "poisson"]
    input_tokens: int
    output_tokens: int
    seed: int = 0
    drain_s: float = 60
    """How long after the last send answers are waited for; what is missing then counts as a timeout."""
    concurrency: tuple[int, ...] = ()
    trace: str = ""
    """A file of recorded arrivals, replayed instead of `rates`."""
    workload: str = "fixed"
    prefix_tokens: int = 0
    heldout: str = ""
    """The file behind `workload = "heldout"`."""
    adapters: Mix = "uniform"
    warm_up_s: float = 0
    slo_ms: Mapping[str, float] = {}
    processes: int = 1


class Measured(NamedTuple):
    """Every level, and the knee if a sweep looked for it."""

    levels: list[LoadResult]
    knee: Knee | None = None


class _Level(NamedTuple):
    """One level to measure."""

    label: str
    arrivals: Arrivals
    rate: float
    requests: list[Request]
    concurrency: int = 0


def measure(target: Target, load: LoadPlan) -> Measured:
    """Measure every level of `load`, in order.

    Raises:
        DataError: a file of prompts or arrivals that cannot be used; found before anything is sent.
        EndpointError: the warm-up, or a whole level, got no answer, or `adapters` weighs other models.

    """
    weigh(target.models, load.adapters)
    prompts = _prompts(load, secrets.token_hex(4))
    trace = _cut(read_trace(Path(load.trace)), load.warm_up_s + load.duration_s) if load.trace else []
    answer_s = _warm_up(target, load, prompts)
    levels: list[LoadResult] = []
    knee = None
    if trace:
        levels.append(_run(target, load, prompts, _traced(target, load, prompts, trace)))
    elif load.rates == "sweep":
        levels, knee = sweep.sweep(lambda rate: _run(target, load, prompts, _open(target, load, prompts, rate)))
    else:
        levels += [_run(target, load, prompts, _open(target, load, prompts, rate)) for rate in load.rates]
    closed = (_closed(target, load, prompts, number, answer_s) for number in load.concurrency)
    return Measured([*levels, *(_run(target, load, prompts, level) for level in closed)], knee)


def warm_up(target: Target, load: LoadPlan) -> float:
    """Ask every model a few times; the quickest answer's seconds.

    Raises:
        EndpointError: no answer.

    """
    return _warm_up(target, load, _prompts(load, secrets.token_hex(4)))


def measure_block(target: Target, load: LoadPlan, answer_s: float) -> LoadResult:
    """The first level of `load` alone, without a warm-up and without a look at engine or GPU: what `compare` repeats.

    The salt is a new one each time: no block is answered from what another left in the server's prefix cache.

    Args:
        target: warmed up before.
        load: one rate or one concurrency.
        answer_s: what `warm_up` said.

    Raises:
        EndpointError: no request was answered.

    """
    prompts = _prompts(load, secrets.token_hex(4))
    if load.concurrency:
        level = _closed(target, load, prompts, load.concurrency[0], answer_s)
    else:
        assert load.rates != "sweep"
        level = _open(target, load, prompts, load.rates[0])
    return _drive(target, load, prompts, level)


def _prompts(load: LoadPlan, salt: str) -> Prompts:
    return source(
        load.workload,
        input_tokens=load.input_tokens,
        output_tokens=load.output_tokens,
        prefix_tokens=load.prefix_tokens,
        heldout=load.heldout,
        seed=load.seed,
        salt=salt,
    )


def _warm_up(target: Target, load: LoadPlan, prompts: Prompts) -> float:
    """Ask every model a few times; the quickest answer's seconds."""
    say(f"warming up {target.model} at {target.url}")
    requests = [
        Request(0.0, model, prompts.make("warm-up", index, load.input_tokens), load.output_tokens, prompts.ignore_eos)
        for index, model in enumerate(target.models * _WARM_UP_REQUESTS)
    ]
    recording = processes.run(target.url, target.key, requests, drain_s=_WARM_UP_S)
    _refuse_silence(target, "the warm-up", recording.records)
    return min(metrics.e2e_ms(record) for record in recording.records if not record.error) / 1e3


def _open(target: Target, load: LoadPlan, prompts: Prompts, rate: float) -> _Level:
    times = schedule(load.arrivals, rate, load.warm_up_s + load.duration_s, load.seed)
    requests = _plan(target, load, prompts, f"{rate}", [Arrival(at_s) for at_s in times])
    return _Level(f"load {rate:g}/s", load.arrivals, rate, requests)


def _traced(target: Target, load: LoadPlan, prompts: Prompts, trace: Sequence[Arrival]) -> _Level:
    requests = _plan(target, load, prompts, "trace", trace)
    rate = len(trace) / max(trace[-1].at_s, 1e-3)
    return _Level(f"load trace {rate:.3g}/s", "trace", rate, requests)


def _closed(target: Target, load: LoadPlan, prompts: Prompts, concurrency: int, answer_s: float) -> _Level:
    """As many requests as answers could come, were each twice as quick as the quickest seen."""
    length_s = load.warm_up_s + load.duration_s
    count = min(_MOST_REQUESTS, concurrency * math.ceil(2 * length_s / max(answer_s, 1e-3) + 1))
    requests = _plan(target, load, prompts, f"{concurrency} in flight", [Arrival(0.0)] * count)
    return _Level(f"load {concurrency} in flight", "closed", 0.0, requests, concurrency)


def _plan(target: Target, load: LoadPlan, prompts: Prompts, level: str, arrivals: Sequence[Arrival]) -> list[Request]:
    return plan(
        arrivals,
        prompts,
        level=level,
        models=target.models,
        input_tokens=load.input_tokens,
        output_tokens=load.output_tokens,
        mix=load.adapters,
        seed=load.seed,
    )


def _cut(trace: Sequence[Arrival], length_s: float) -> list[Arrival]:
    kept = [arrival for arrival in trace if arrival.at_s < length_s]
    if len(kept) < len(trace):
        say(f"the trace is longer than {length_s:g} s: the first {len(kept)} of {len(trace)} requests are replayed")
    return kept


def _run(target: Target, load: LoadPlan, prompts: Prompts, level: _Level) -> LoadResult:
    before = engine_metrics.scrape(target.url, target.key)
    with gpu.watch() as gpus:
        result = _drive(target, load, prompts, level, partial(_show, level.label))
    engine = engine_metrics.change(before, engine_metrics.scrape(target.url, target.key))
    return result.model_copy(update={"engine": engine, "gpus": gpus})


def _drive(target: Target, load: LoadPlan, prompts: Prompts, level: _Level, watch: Watcher | None = None) -> LoadResult:
    length_s = load.warm_up_s + load.duration_s
    last_s = length_s if level.concurrency else level.requests[-1].at_s
    recording = processes.run(
        target.url,
        target.key,
        level.requests,
        drain_s=load.drain_s + length_s - last_s,
        processes=load.processes,
        concurrency=level.concurrency,
        stop_s=length_s if level.concurrency else None,
        watch=watch,
    )
    if watch:
        watch(length_s, recording.records)
    _refuse_silence(target, level.label, recording.records)
    return metrics.summarise(
        recording,
        workload=f"{prompts.name}, {Path(load.trace).stem}" if level.arrivals == "trace" else prompts.name,
        model=target.model,
        arrivals=level.arrivals,
        rate=level.rate,
        concurrency=level.concurrency,
        window_s=(load.warm_up_s, length_s),
        slo_ms=load.slo_ms,
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
