"""How often `bench compare` cries wolf, and what it finds: false alarms in A/A comparisons, power at planted changes.

A simulation of pairs of blocks, not of a server: each block's TTFT, TPOT, E2E and throughput get heavy-tailed noise
(Student's t with 3 degrees of freedom, scaled by --noise) of their own, as much again shared by the four, and a drift
that both blocks of a pair share but for one block's time. The verdicts are those of `live.compare_pairs`, so the
test, its interval, Holm and the margin are the ones that users get. Quality: binary items of a model that is right in
90 %, with 5 % of the answers changing between any two runs.

It does not show what the noise of a real server is: `--noise` is a guess until it is measured.

    .venv/bin/python bench/studies/power.py --out bench/baselines/compare-power-2-cores.json
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

import numpy as np

from tuneship.bench.compare.live import Pair, compare_pairs
from tuneship.bench.compare.paired import compare_scores
from tuneship.bench.compare.verdict import Evidence, judge
from tuneship.core import hardware
from tuneship.core.report import ClientHealth, LoadResult, Percentiles

LATENCY_MARGIN, QUALITY_MARGIN = 0.02, 0.01
SLOWER, POINTS, ITEMS = (0.03, 0.05, 0.10), (0.02, 0.05, 0.10), (200, 1000)


def main() -> None:
    """Run all of it and write the shares as JSON on stdout, or into `--out`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--comparisons", type=int, default=240)
    parser.add_argument("--quality-comparisons", type=int, default=25)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--noise", type=float, default=0.03)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    machine = hardware.detect()

    def latency(slower: float) -> float:
        found = [_any_regressed(rng, slower, options.pairs, options.noise) for _ in range(options.comparisons)]
        return float(np.mean(found))

    def quality(points: float, items: int) -> float:
        return float(np.mean([_quality_regressed(rng, points, items) for _ in range(options.quality_comparisons)]))

    result = {
        "what": "simulated pairs; share of comparisons with any `regressed`",
        "command": shlex.join(["python", *sys.argv]),
        "hardware": f"{machine.cpu}, {machine.cores} cores",
        "versions": hardware.versions(("tuneship", "numpy", "scipy")),
        "options": {name: value for name, value in vars(options).items() if name != "out"},
        "margins": {"latency": LATENCY_MARGIN, "quality": QUALITY_MARGIN},
        "latency": {"false_alarms": latency(0), "power": {f"{slower:.0%}": latency(slower) for slower in SLOWER}},
        "quality": {
            f"{items} items": {
                "false_alarms": quality(0, items),
                "power": {f"{100 * points:.0f} points": quality(points, items) for points in POINTS},
            }
            for items in ITEMS
        },
    }
    text = json.dumps(result, indent=1) + "\n"
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)


def _any_regressed(rng: np.random.Generator, slower: float, pairs: int, noise: float) -> bool:
    drift = np.cumsum(rng.normal(0, noise / 3, 2 * pairs))
    found = []
    for index in range(pairs):
        first, second = _block(rng, noise, drift[2 * index]), _block(rng, noise, drift[2 * index + 1])
        a, b = (second, first) if index % 2 else (first, second)
        found.append(Pair(_level(a), _level(b * (1 + slower))))
    return any(row.verdict == "regressed" for row in compare_pairs(found, LATENCY_MARGIN))


def _block(rng: np.random.Generator, noise: float, drift: float) -> np.ndarray:
    """Factors on TTFT, TPOT, E2E and time per token."""
    return np.asarray(np.exp(drift + noise * (rng.standard_t(3, 4) + rng.standard_t(3))))


def _level(factors: np.ndarray) -> LoadResult:
    ttft, tpot, e2e, time = (float(factor) for factor in factors)

    def flat(value: float) -> Percentiles:
        return Percentiles(p50=value, p90=value, p95=value, p99=value, mean=value)

    return LoadResult(
        workload="simulated",
        model="m",
        arrivals="poisson",
        rate=1,
        requests=1,
        completed=1,
        duration_s=1,
        input_tokens=1,
        output_tokens=1,
        ttft_ms=flat(100 * ttft),
        tpot_ms=flat(20 * tpot),
        itl_ms=None,
        e2e_ms=flat(1000 * e2e),
        output_tokens_per_s=100 / time,
        client=ClientHealth(lag_p99_ms=0, valid=True),
    )


def _quality_regressed(rng: np.random.Generator, points: float, items: int) -> bool:
    right = rng.random(items) < 0.9
    redrawn = rng.random(items) < 0.05
    other = np.where(redrawn, rng.random(items) < 0.9, right) & (rng.random(items) >= points / 0.9)
    found = compare_scores(right.astype(float).tolist(), other.astype(float).tolist())
    row = judge([Evidence("score", None, None, QUALITY_MARGIN, "points", *found)])[0]
    return row.verdict == "regressed"


if __name__ == "__main__":
    main()
