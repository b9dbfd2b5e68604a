"""How often `bench compare` cries wolf on a real server, and what it finds: A/A comparisons, and planted slow-downs.

A proxy of its own process stands before a running server and stretches answers: a chunk that came t seconds after its
request goes on at (1 + x) t, so TTFT, TPOT and E2E all grow by the share x. Both sides go through it; x is 0 for the
baseline and for an A/A comparison. Comparisons are whole ones: pairs of blocks in ABBA order, log-ratios, exact
sign-flip test, Holm, verdict. Their kinds come in random order, so that a drift of the machine meets all of them.

Comparisons of the same kind are afterwards also put together by twos, fours and eights: what more pairs would find.
It ends after --minutes, with as many comparisons as were done.

Several servers of one testbed, each on a GPU of its own, share the work.

    tuneship serve MODEL                       # elsewhere
    .venv/bin/python bench/studies/power.py http://127.0.0.1:30000 --minutes 30 --out FILE
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from tuneship.bench import testbed
from tuneship.bench.compare import live
from tuneship.bench.compare.live import Pair
from tuneship.bench.compare.metrics import LOAD_METRICS
from tuneship.bench.compare.verdict import judge
from tuneship.bench.load.measure import LoadPlan, measure_block, warm_up
from tuneship.bench.target import Target, resolve
from tuneship.core.report import LoadResult

SLOWER = (0.0, 0.03, 0.05, 0.10)
_SPIN_S = 0.0015
"""A timer may be a millisecond late, which is more than 3 % of a small gap: the rest is waited for awake."""


def main() -> None:
    """Compare until the time is up, and write the shares as JSON on stdout, and into `--out`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("urls", nargs="+")
    parser.add_argument("--model", default="")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--pairs", type=int, default=8, help="a comparison")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--duration-s", type=float, default=0.5, help="of a block")
    parser.add_argument("--input-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=16)
    parser.add_argument("--margin", type=float, default=0.01)
    parser.add_argument("--a-a", type=int, default=4, help="A/A comparisons for one of each slow-down")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--proxy", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.proxy:
        asyncio.run(_proxy(options.urls[0]))
        return
    target = resolve(options.urls[0], options.model)
    with ProcessPoolExecutor(len(options.urls), multiprocessing.get_context("spawn")) as pool:
        shares = list(pool.map(partial(_compare_until_the_end, options=options), options.urls))
    found = {slower: [pairs for share in shares for pairs in share[slower]] for slower in SLOWER}
    result = {
        "what": "comparisons of a real server with itself; share of them with any metric regressed",
        "command": shlex.join([".venv/bin/python", *sys.argv]),
        "testbed": testbed.describe(target).model_dump(mode="json"),
        "options": {name: value for name, value in vars(options).items() if name not in {"out", "proxy", "urls"}},
        "planted": [_as_record(slower, pairs, options) for slower, pairs in found.items()],
    }
    text = json.dumps(result, indent=1) + "\n"
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def _compare_until_the_end(where: str, options: argparse.Namespace) -> dict[float, list[list[Pair]]]:
    """Comparisons by what was planted in them."""
    target = resolve(where, options.model)
    closed = (options.concurrency,)
    load = LoadPlan((), options.duration_s, "poisson", options.input_tokens, options.output_tokens, concurrency=closed)
    kinds = [0.0] * options.a_a + [slower for slower in SLOWER if slower]
    rng = random.Random(where)
    found: dict[float, list[list[Pair]]] = {slower: [] for slower in SLOWER}
    with _running_proxy(target.url) as url:
        sides = {slower: target._replace(url=f"{url}/{round(slower * 1000)}") for slower in SLOWER}
        answer_s = warm_up(sides[0.0], load)
        measure_block(sides[0.0], load, answer_s)
        end = time.monotonic() + options.minutes * 60
        while time.monotonic() < end:
            for slower in rng.sample(kinds, len(kinds)):
                seed = options.pairs * sum(map(len, found.values()))
                measure = partial(_measure, load, answer_s, seed)
                found[slower].append(live.measure_pairs(sides[0.0], sides[slower], measure, options.pairs))
    return found


def _measure(load: LoadPlan, answer_s: float, first_seed: int, side: Target, index: int) -> LoadResult:
    return measure_block(side, load._replace(seed=first_seed + index), answer_s)


def _as_record(slower: float, comparisons: Sequence[Sequence[Pair]], options: argparse.Namespace) -> dict[str, Any]:
    pairs = [pair for comparison in comparisons for pair in comparison]
    ratios = {metric.name: live.log_ratios(metric, pairs) for metric in LOAD_METRICS}
    by_pairs = {}
    for times in (1, 2, 4, 8):
        starts = range(0, len(comparisons) - times + 1, times)
        together = [[pair for one in comparisons[i : i + times] for pair in one] for i in starts]
        verdicts = [_verdicts(group, options.margin) for group in together]
        by_pairs[str(times * options.pairs)] = {
            "comparisons": len(verdicts),
            "regressed": sum("regressed" in found for found in verdicts),
            "told_no_worse": sum(set(found) == {"no worse than the margin"} for found in verdicts),
        }
    return {
        "slower": slower,
        "pairs": len(pairs),
        "lagged_pairs": sum(not (pair.a.client.valid and pair.b.client.valid) for pair in pairs),
        "mean_log_ratio": {name: statistics.fmean(values) for name, values in ratios.items() if values},
        "sd_log_ratio": {name: statistics.stdev(values) for name, values in ratios.items() if len(values) > 1},
        "by_pairs": by_pairs,
    }


def _verdicts(pairs: Sequence[Pair], margin: float) -> list[str]:
    return [row.verdict for row in judge(live.weigh_pairs(pairs, margin))]


@contextmanager
def _running_proxy(upstream: str) -> Iterator[str]:
    process = subprocess.Popen([sys.executable, __file__, upstream, "--proxy"], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.communicate()


async def _proxy(upstream: str) -> None:
    """Stands at `/<x in thousandths>/v1/chat/completions`."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None), auto_decompress=False) as session:

        async def chat(request: web.Request) -> web.StreamResponse:
            arrived_s = time.perf_counter()
            factor = 1 + int(request.match_info["thousandths"]) / 1000
            body = await request.read()
            headers = {"Content-Type": "application/json", "Authorization": request.headers.get("Authorization", "")}
            async with session.post(f"{upstream}/v1/chat/completions", data=body, headers=headers) as answer:
                response = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.content_type})
                await response.prepare(request)
                waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
                writer = asyncio.create_task(_write_later(response, waiting))
                async for chunk in answer.content.iter_any():
                    due_s = arrived_s + (time.perf_counter() - arrived_s) * factor
                    waiting.put_nowait((due_s, chunk))
                waiting.put_nowait((0.0, b""))
                await writer
            return response

        app = web.Application()
        app.router.add_post("/{thousandths}/v1/chat/completions", chat)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        sys.stdout.write(f"http://{host}:{port}\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


async def _write_later(response: web.StreamResponse, waiting: asyncio.Queue[tuple[float, bytes]]) -> None:
    while True:
        due_s, chunk = await waiting.get()
        if not chunk:
            return
        if (wait_s := due_s - time.perf_counter() - _SPIN_S) > 0:
            await asyncio.sleep(wait_s)
        while time.perf_counter() < due_s:  # noqa: ASYNC110 - nothing tells that it is time
            await asyncio.sleep(0)
        await response.write(chunk)


if __name__ == "__main__":
    main()
