"""How often the paired test of scores cries wolf, and what it finds: false alarms, and power at planted drops.

A simulation of items, not of a model: binary items of a model that is right in 90 %, with 5 % of the answers changing
between any two runs; a drop of 5 points makes as many right items wrong. The verdicts are those of `bench compare`.

    .venv/bin/python bench/studies/power_quality.py --out bench/baselines/compare-power-quality.json
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

import numpy as np

from tuneship.bench.compare.paired import compare_scores
from tuneship.bench.compare.verdict import Evidence, judge
from tuneship.core import hardware

MARGIN = 0.01
POINTS, ITEMS = (0.02, 0.05, 0.10), (200, 1000)


def main() -> None:
    """Run all of it and write the shares as JSON on stdout, and into `--out`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--comparisons", type=int, default=200)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rng = np.random.default_rng(0)

    def share(points: float, items: int) -> float:
        return float(np.mean([_regressed(rng, points, items) for _ in range(options.comparisons)]))

    result = {
        "what": "simulated items; share of comparisons that regressed",
        "command": shlex.join([".venv/bin/python", *sys.argv]),
        "versions": hardware.versions(("tuneship", "numpy", "scipy")),
        "comparisons": options.comparisons,
        "margin": MARGIN,
        "by_items": {
            str(items): {
                "false_alarms": share(0, items),
                "power": {f"{100 * points:.0f} points": share(points, items) for points in POINTS},
            }
            for items in ITEMS
        },
    }
    text = json.dumps(result, indent=1) + "\n"
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def _regressed(rng: np.random.Generator, points: float, items: int) -> bool:
    right = rng.random(items) < 0.9
    redrawn = rng.random(items) < 0.05
    other = np.where(redrawn, rng.random(items) < 0.9, right) & (rng.random(items) >= points / 0.9)
    found = compare_scores(right.astype(float).tolist(), other.astype(float).tolist())
    row = judge([Evidence("score", None, None, MARGIN, "points", *found)])[0]
    return row.verdict == "regressed"


if __name__ == "__main__":
    main()
