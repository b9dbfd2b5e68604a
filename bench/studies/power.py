"""How often `bench compare` cries wolf on a real server, and what it finds: A/A comparisons, and planted slow-downs.

Pairs of blocks of a running server with itself, in ABBA order, for --minutes. Every 8 pairs in a row are one A/A
comparison, judged as users' are: log-ratios, exact sign-flip test, Holm, verdict. The same pairs with the second side's
figures made worse by 3, 5 or 10 % show what would have been found in this server's own noise. Longer comparisons are
put together from neighbours.

Not shown: a slow-down that is no common factor (a tail, a stall now and then). One change of the server's speed in the
midst of a comparison is in it, because it happened.

    taskset -c 0 .venv/bin/tuneship serve MODEL             # elsewhere; the client's core is not the engine's
    taskset -c 1 .venv/bin/python bench/studies/power.py http://127.0.0.1:30000 --minutes 30 --out FILE
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tuneship.bench import testbed
from tuneship.bench.compare import live
from tuneship.bench.compare.live import Pair
from tuneship.bench.compare.metrics import LOAD_METRICS
from tuneship.bench.compare.verdict import judge
from tuneship.bench.load.measure import LoadPlan, measure_block, warm_up
from tuneship.bench.target import Target, resolve
from tuneship.core.report import LoadResult, Percentiles

SLOWER = (0.0, 0.03, 0.05, 0.10)
_WARM_UP_BLOCKS = 20
_LATENCIES = ("ttft_ms", "tpot_ms", "e2e_ms")


def main() -> None:
    """Measure until the time is up, and write the shares as JSON on stdout, and into `--out`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--model", default="")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--concurrency", type=int, default=2)
    parser.add_argument("--duration-s", type=float, default=0.4, help="of a block")
    parser.add_argument("--input-tokens", type=int, default=16)
    parser.add_argument("--output-tokens", type=int, default=16)
    parser.add_argument("--margin", type=float, default=0.01)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    target = resolve(options.url, options.model)
    pairs = measure(target, options)
    result = {
        "what": "pairs of a real server with itself; planted: the second side's figures made worse by a factor",
        "command": shlex.join([".venv/bin/python", *sys.argv]),
        "testbed": testbed.describe(target).model_dump(mode="json"),
        "block": {
            name: getattr(options, name) for name in ("concurrency", "duration_s", "input_tokens", "output_tokens")
        },
        "margin": options.margin,
        "pairs": len(pairs),
        "lagged_pairs": sum(not (pair.a.client.valid and pair.b.client.valid) for pair in pairs),
        "failed_pairs": sum(bool(pair.a.errors or pair.b.errors) for pair in pairs),
        "noise": {metric.name: _noise(live.log_ratios(metric, pairs)) for metric in LOAD_METRICS},
        "comparisons": [by_length(pairs, length, options.margin) for length in (8, 16, 32, 64)],
    }
    text = json.dumps(result, indent=1) + "\n"
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def measure(target: Target, options: argparse.Namespace) -> list[Pair]:
    """Pairs of `target` with itself until the time is up."""
    load = LoadPlan(
        (),
        options.duration_s,
        "poisson",
        options.input_tokens,
        options.output_tokens,
        concurrency=(options.concurrency,),
    )
    answer_s = warm_up(target, load)
    found: list[Pair] = []

    def block(side: Target, seed: int) -> LoadResult:
        return measure_block(side, load._replace(seed=len(found) + seed), answer_s)

    for seed in range(_WARM_UP_BLOCKS):
        block(target, -1 - seed)
    end = time.monotonic() + options.minutes * 60
    while time.monotonic() < end:
        found += live.measure_pairs(target, target, block, 2)
    return found


def by_length(pairs: Sequence[Pair], length: int, margin: float) -> dict[str, Any]:
    """Comparisons of `length` pairs each: how many there are, and the share with any metric regressed, by plant."""
    starts = range(0, len(pairs) - length + 1, length)
    groups = [pairs[start : start + length] for start in starts]
    regressed = {slower: sum(is_regressed(group, slower, margin) for group in groups) for slower in SLOWER}
    found = {f"{slower:.0%}": round(count / max(1, len(groups)), 3) for slower, count in regressed.items() if slower}
    return {
        "pairs": length,
        "comparisons": len(groups),
        "false_alarms": regressed[0.0],
        "found": found,
    }


def is_regressed(pairs: Sequence[Pair], slower: float, margin: float) -> bool:
    """Whether any metric is called regressed when the second side is slower by that share."""
    planted = [Pair(pair.a, plant(pair.b, slower)) for pair in pairs]
    return any(row.verdict == "regressed" for row in judge(live.weigh_pairs(planted, margin)))


def plant(level: LoadResult, slower: float) -> LoadResult:
    """The level as it would have been, had everything taken longer by that share."""
    changed: dict[str, Any] = {"output_tokens_per_s": level.output_tokens_per_s / (1 + slower)}
    for name in _LATENCIES:
        latency = getattr(level, name)
        assert isinstance(latency, Percentiles)
        changed[name] = latency.model_copy(update={"p50": latency.p50 * (1 + slower)})
    return level.model_copy(update=changed)


def _noise(ratios: Sequence[float]) -> dict[str, float]:
    return {"mean": round(statistics.fmean(ratios), 5), "sd": round(statistics.stdev(ratios), 5)} if ratios else {}


if __name__ == "__main__":
    main()
