"""What the door costs a real engine under many streams: in blocks, A straight to the engine, B through the door.

    figures = measure(engine_url, door_url, "base", streams=64, blocks=10, clients=2, window_s=5.0)

All streams of a load begin together, with answers of one length. There are two kinds of blocks.

Quiet ones, ABBA, give the tokens a second: of each stream, all that came after the last stream's first chunk, over the
time until its last. Tokens, not chunks: an engine whose HTTP process is behind puts several into one. Counts of chunks
between two moments told 64 streams on an H200 within 0.5 % a block, and 256, 10,900 tokens a second, within 10 %.

In the others the door carries the streams, twice a block, and probes come while every stream is being answered: single
requests, always in pairs, one through the door and one past it, two milliseconds apart, now this one first and now
that. What the door adds to a TTFT is the median over pairs: both of a pair meet the same step. Throughput is not read
there: how many probes share a step is changed by the door's own delay.

Loops of short answers cannot tell either. There a stream waits for the prompts of those that ended with it, and how
these fall together is chance: on an H200, blocks of 64 streams differed by 8 % and their median TTFT by 40 ms. Probes
without a partner did not tell it either: which part of a step they meet, and how many prompts stop the streams, is
chance too.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

from tuneship.bench.compare.statistics import sign_flip
from tuneship.bench.load import processes
from tuneship.bench.load.arrivals import schedule
from tuneship.bench.load.prompts import source
from tuneship.bench.load.stream import RequestRecord
from tuneship.bench.load.workload import Request

_PROMPT_TOKENS = 128
_FIRST_TOKENS = 64
"""Of the block that finds out how long an answer is to be."""
_PROBE_TOKENS, _PROBES_PER_S = 8, 8.0
_APART_S = 0.002
_FEWEST_PROBES = 5
PARTS = ("throughput", "ttft")
_WAYS = {"throughput": ("past", "through", "through", "past"), "ttft": ("through", "through")}
"""Of the loads of one block."""


class Block(NamedTuple):
    """What was read of one load."""

    tokens_per_s: float
    ttft_ms: list[tuple[float, float]]
    """Of pairs of probes: past the door, through it."""
    began_s: float
    """When all streams were being answered, from the moment at which they were sent."""
    seconds: float
    """For how long all of them were."""
    lag_ms: float
    """The 99th percentile of how late the client's loops woke."""
    chunks_per_token: float

    def added_ms(self) -> float:
        """The median of what the door added to a pair's TTFT."""
        return statistics.median(through - past for past, through in self.ttft_ms)


def measure(
    engine_url: str, door_url: str, model: str, *, streams: int, blocks: int, clients: int, window_s: float,
    parts: Sequence[str] = PARTS, say: Callable[..., None] = print,
) -> dict[str, Any]:  # fmt: skip
    """Figures of the door against the engine alone: shares and ms, upper bounds one-sided at 95 %.

    Args:
        engine_url: without `/v1`, like `door_url`.
        door_url: of the door before that engine.
        model: whom both are asked for.
        streams: at once.
        blocks: of each part.
        clients: processes that read them.
        window_s: for about how long all of them are to be answered.
        parts: of `PARTS`.
        say: hears what each block gave.

    Raises:
        RuntimeError: a request failed, or a block had too few pairs of probes.

    """
    ask = _Asker({"past": engine_url, "through": door_url}, model, streams, clients)
    first = ask.block("through", _FIRST_TOKENS, None)
    tokens = max(_FIRST_TOKENS, round(window_s * first.tokens_per_s / streams))
    spells = {"throughput": None, "ttft": _Spell(first.began_s, first.began_s + window_s)}
    figures: dict[str, Any] = {"streams": streams, "blocks": blocks, "answer_tokens": tokens}
    for part in parts:
        ask.block("past", tokens, spells[part])
        loads: list[tuple[Block, ...]] = []
        for number in range(blocks):
            loads.append(tuple(ask.block(way, tokens, spells[part], number) for way in _WAYS[part]))
            say("door", streams, part, f"{number + 1} of {blocks}", *_said(part, loads[-1]))
        figures[part] = {"throughput": _throughput, "ttft": _ttft}[part](loads)
    return figures


def _said(part: str, load: tuple[Block, ...]) -> list[Any]:
    if part == "ttft":
        return [round(_added_ms(load), 2)]
    return [round(_lost(load), 4), [round(block.tokens_per_s) for block in load]]


def _lost(load: tuple[Block, ...]) -> float:
    a1, b1, b2, a2 = (math.log(block.tokens_per_s) for block in load)
    return (a1 + a2 - b1 - b2) / 2


def _added_ms(load: tuple[Block, ...]) -> float:
    return statistics.mean(block.added_ms() for block in load)


def _throughput(loads: Sequence[tuple[Block, ...]]) -> dict[str, Any]:
    lost = sign_flip([_lost(load) for load in loads])
    past, through = [b for a1, _, _, a2 in loads for b in (a1, a2)], [b for _, b1, b2, _ in loads for b in (b1, b2)]
    return {
        "engine_tokens_per_s": round(statistics.median(block.tokens_per_s for block in past), 1),
        "door_tokens_per_s": round(statistics.median(block.tokens_per_s for block in through), 1),
        "lost": round(lost.mean, 5), "lost_upper": round(lost.upper, 5),
        "client_lag_ms_p99": [round(statistics.median(block.lag_ms for block in way), 2) for way in (past, through)],
        "chunks_per_token": [[round(block.chunks_per_token, 3) for block in load] for load in loads],
        "window_s": _window_s(loads),
        "each_block": [round(_lost(load), 5) for load in loads],
        "tokens_per_s": [[round(block.tokens_per_s, 1) for block in load] for load in loads],
    }  # fmt: skip


def _ttft(loads: Sequence[tuple[Block, ...]]) -> dict[str, Any]:
    added = sign_flip([_added_ms(load) for load in loads])
    pairs = [pair for load in loads for block in load for pair in block.ttft_ms]
    return {
        "pairs_of_probes": len(pairs),
        "engine_ms": round(statistics.median(one for one, _ in pairs), 2),
        "door_ms": round(statistics.median(other for _, other in pairs), 2),
        "added_ms": round(added.mean, 3), "added_ms_upper": round(added.upper, 3),
        "window_s": _window_s(loads),
        "each_block": [round(_added_ms(load), 3) for load in loads],
    }  # fmt: skip


def _window_s(loads: Sequence[tuple[Block, ...]]) -> float:
    return round(statistics.median(block.seconds for load in loads for block in load), 2)


class _Spell(NamedTuple):
    """Some time of a block, from the moment at which its streams are sent."""

    from_s: float
    until_s: float


class _Probe(NamedTuple):
    sent_s: float
    """On `time.perf_counter`."""
    ttft_s: float


class _Asker:
    """Who sends a block; no two blocks have a prompt in common."""

    def __init__(self, urls: dict[str, str], model: str, streams: int, clients: int) -> None:
        self._urls, self._model, self._streams, self._clients = urls, model, streams, clients
        self._block = 0

    def block(self, way: str, tokens: int, probed: _Spell | None, seed: int = 0) -> Block:
        """Streams of `tokens`, and probes in about that spell; with the same seed, probes leave at the same times."""
        self._block += 1
        begun: Future[float] = Future()

        def watch(now_s: float, _: object) -> None:
            if not begun.done():
                begun.set_result(time.perf_counter() - now_s)

        asked = self._requests("stream", [0.0] * self._streams, tokens)
        with ThreadPoolExecutor(3) as pool:
            load = pool.submit(
                processes.run, self._urls[way], "", asked, drain_s=120, processes=self._clients, watch=watch
            )
            either: list[Future[Any]] = [begun, load]
            wait(either, return_when=FIRST_COMPLETED)
            zero = begun.result(0) if begun.done() else math.nan  # it ended before anybody looked
            probes = self._probes(pool, zero, probed, seed) if probed and begun.done() else []
            recording = load.result()
        streams = _complete(recording.records)
        start = max(record.chunks_s[0] for record in streams)
        end = min(record.chunks_s[-1] for record in streams)
        if end <= start:
            raise RuntimeError(f"no moment in which all {self._streams} streams were being answered")
        within = [
            (1e3 * past.ttft_s, 1e3 * through.ttft_s)
            for past, through in probes
            if all(zero + start <= one.sent_s and one.sent_s + one.ttft_s <= zero + end for one in (past, through))
        ]
        if probed and len(within) < _FEWEST_PROBES:
            raise RuntimeError(f"{len(within)} pairs of probes in {end - start:.1f} s with all streams")
        return Block(
            tokens_per_s=sum(_tokens_per_s(record, start) for record in streams),
            ttft_ms=within,
            began_s=start,
            seconds=end - start,
            lag_ms=1e3 * statistics.quantiles(recording.loop_lag_s, n=100)[-1],
            chunks_per_token=sum(len(r.chunks_s) for r in streams) / sum(r.output_tokens for r in streams),
        )

    def _probes(self, pool: ThreadPoolExecutor, zero: float, spell: _Spell, seed: int) -> list[tuple[_Probe, _Probe]]:
        """Pairs that both said something; `zero` is when the streams were sent, on `time.perf_counter`."""
        from_s = max(0.0, zero + spell.from_s - time.perf_counter())
        left_s = zero + spell.until_s - time.perf_counter() - from_s
        if not left_s > 0:
            return []
        times = [from_s + at_s for at_s in schedule("poisson", _PROBES_PER_S, left_s, seed=seed)]
        ahead = [_APART_S * (index % 2) for index in range(len(times))]  # now the one leaves first, now the other
        behind = [_APART_S - wait_s for wait_s in ahead]
        both = [
            pool.submit(self._ask, self._urls[way], [at_s + wait_s for at_s, wait_s in zip(times, waits, strict=True)])
            for way, waits in (("past", ahead), ("through", behind))
        ]
        past, through = (future.result() for future in both)
        return [(past[index], through[index]) for index in past.keys() & through.keys()]

    def _ask(self, url: str, times: Sequence[float]) -> dict[int, _Probe]:
        """Probes, by their place in `times`."""
        asked = self._requests("probe", times, _PROBE_TOKENS)
        began = time.perf_counter()
        records = processes.run(url, "", asked, drain_s=60).records
        _complete([record for record in records if record.error != "no_content"])
        return {
            index: _Probe(began + record.sent_s, record.chunks_s[0] - record.sent_s)
            for index, record in enumerate(records)
            if not record.error
        }

    def _requests(self, what: str, times: Sequence[float], tokens: int) -> list[Request]:
        level = f"{what} {self._block}"
        prompts = source("fixed", input_tokens=_PROMPT_TOKENS, output_tokens=tokens, salt=f"{level} {time.time_ns()}")
        return [
            Request(at_s, self._model, prompts.make(level, index, _PROMPT_TOKENS), tokens)
            for index, at_s in enumerate(times)
        ]


def _tokens_per_s(record: RequestRecord, start_s: float) -> float:
    """Of one stream, from `start_s` to its last chunk; until then, when prompts are read, a chunk is a token."""
    before = sum(at_s <= start_s for at_s in record.chunks_s)
    return (record.output_tokens - before) / (record.chunks_s[-1] - start_s)


def _complete(records: Sequence[RequestRecord]) -> list[RequestRecord]:
    failed = [record for record in records if record.error]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(records)} failed: {failed[0].error}: {failed[0].detail}")
    return list(records)
