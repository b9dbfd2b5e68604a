"""What the door costs a real engine under many streams: ABBA blocks, A straight to the engine, B through the door.

    figures = measure(engine_url, door_url, "base", streams=64, blocks=10, clients=2, window_s=3.0)

A block: all streams begin together, with answers of one length. While every one of them is being answered (from the
last one's first chunk to the first one's end) two things are read: the tokens a second of all, and the TTFT of probes.
Probes are single requests in between, at the same times in each of the four blocks, and always in pairs: one through
the door and one past it, two milliseconds apart, now this one first and now that. What the door adds to a TTFT is the
median over pairs, of the blocks in which the door carries the streams: both of a pair meet the same step.

Loops of short answers cannot tell it. There a stream waits for the prompts of those that ended with it, and how these
fall together is chance: on an H200, blocks of 64 streams differed by 8 % and their median TTFT by 40 ms. Probes without
a partner did not tell it either: which part of a step they meet, and how many prompts stop the streams, is chance too.
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


class Block(NamedTuple):
    """What was read while all streams were being answered."""

    tokens_per_s: float
    ttft_ms: list[tuple[float, float]]
    """Of pairs of probes: past the door, through it."""
    began_s: float
    """Of that time, from the moment at which the streams were sent."""
    seconds: float

    def added_ms(self) -> float:
        """The median of what the door added to a pair's TTFT."""
        return statistics.median(through - past for past, through in self.ttft_ms)


def measure(
    engine_url: str, door_url: str, model: str, *, streams: int, blocks: int, clients: int, window_s: float,
    say: Callable[..., None] = print,
) -> dict[str, Any]:  # fmt: skip
    """Figures of the door against the engine alone: shares and ms, upper bounds one-sided at 95 %.

    Args:
        engine_url: without `/v1`, like `door_url`.
        door_url: of the door before that engine.
        model: whom both are asked for.
        streams: at once.
        blocks: of four each.
        clients: processes that read them.
        window_s: for about how long all of them are to be answered.
        say: hears what each block gave.

    Raises:
        RuntimeError: a request failed, or a block had too few pairs of probes.

    """
    ask = _Asker({"past": engine_url, "through": door_url}, model, streams, clients)
    first = ask.block("through", _FIRST_TOKENS, until_s=0.0)
    tokens = max(_FIRST_TOKENS, round(window_s * first.tokens_per_s / streams))
    until_s = first.began_s + window_s
    ask.block("past", tokens, until_s)
    slower, later = list[float](), list[float]()
    past, through = list[Block](), list[Block]()
    for number in range(blocks):
        a1, b1 = ask.block("past", tokens, until_s, number), ask.block("through", tokens, until_s, number)
        b2, a2 = ask.block("through", tokens, until_s, number), ask.block("past", tokens, until_s, number)
        past, through = [*past, a1, a2], [*through, b1, b2]
        slower.append((math.log(a1.tokens_per_s * a2.tokens_per_s) - math.log(b1.tokens_per_s * b2.tokens_per_s)) / 2)
        later.append((b1.added_ms() + b2.added_ms()) / 2)
        say("door", streams, f"{number + 1} of {blocks}", round(slower[-1], 4), round(later[-1], 2))
    lost, added = sign_flip(slower), sign_flip(later)
    pairs = [pair for block in through for pair in block.ttft_ms]
    return {
        "streams": streams, "blocks": blocks, "answer_tokens": tokens,
        "window_s": round(statistics.median(block.seconds for block in past + through), 2),
        "engine_tokens_per_s": round(statistics.median(block.tokens_per_s for block in past), 1),
        "door_tokens_per_s": round(statistics.median(block.tokens_per_s for block in through), 1),
        "throughput_lost": round(lost.mean, 5), "throughput_lost_upper": round(lost.upper, 5),
        "pairs_of_probes": len(pairs),
        "engine_ttft_ms": round(statistics.median(one for one, _ in pairs), 2),
        "door_ttft_ms": round(statistics.median(other for _, other in pairs), 2),
        "ttft_added_ms": round(added.mean, 3), "ttft_added_ms_upper": round(added.upper, 3),
        "each_block": {"throughput_lost": [round(x, 5) for x in slower], "ttft_added_ms": [round(x, 3) for x in later]},
    }  # fmt: skip


class _Probe(NamedTuple):
    sent_s: float
    """On `time.perf_counter`."""
    ttft_s: float


class _Asker:
    """Who sends a block; no two blocks have a prompt in common."""

    def __init__(self, urls: dict[str, str], model: str, streams: int, clients: int) -> None:
        self._urls, self._model, self._streams, self._clients = urls, model, streams, clients
        self._block = 0

    def block(self, way: str, tokens: int, until_s: float, times: int = 0) -> Block:
        """Streams of `tokens`, and probes until about `until_s` after these were sent (0: none).

        `times` is a seed: with the same one, probes leave at the same times.
        """
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
            probes = self._probes(pool, zero + until_s - time.perf_counter(), times)
            streams = _complete(load.result().records)
        start = max(record.chunks_s[0] for record in streams)
        end = min(record.chunks_s[-1] for record in streams)
        if end <= start:
            raise RuntimeError(f"no moment in which all {self._streams} streams were being answered")
        within = [
            (1e3 * past.ttft_s, 1e3 * through.ttft_s)
            for past, through in probes
            if all(zero + start <= one.sent_s and one.sent_s + one.ttft_s <= zero + end for one in (past, through))
        ]
        if until_s and len(within) < _FEWEST_PROBES:
            raise RuntimeError(f"{len(within)} pairs of probes in {end - start:.1f} s with all streams")
        tokens_within = sum(
            record.output_tokens * sum(start < at <= end for at in record.chunks_s) / len(record.chunks_s)
            for record in streams
        )
        return Block(tokens_within / (end - start), within, start, end - start)

    def _probes(self, pool: ThreadPoolExecutor, left_s: float, seed: int) -> list[tuple[_Probe, _Probe]]:
        """Pairs that both said something."""
        if not left_s > 0:
            return []
        times = schedule("poisson", _PROBES_PER_S, left_s, seed=seed)
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


def _complete(records: Sequence[RequestRecord]) -> list[RequestRecord]:
    failed = [record for record in records if record.error]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(records)} failed: {failed[0].error}: {failed[0].detail}")
    return list(records)
