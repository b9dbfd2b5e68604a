"""What the pages say of the quickstart is in the file that they name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
FIRST: dict[str, Any] = json.loads((ROOT / "bench" / "baselines" / "spine-2-cores.json").read_text(encoding="utf-8"))
SECOND: dict[str, Any] = FIRST["again"]


def told(results: list[dict[str, Any]], figure: str) -> str:
    """Of base and tuned, as the pages write it."""
    base, tuned = (next(one for one in results if one["role"] == role) for role in ("base", "tuned"))
    return f"{base[figure]:.3f} ± {base['stderr']:.3f}, {tuned[figure]:.3f} ± {tuned['stderr']:.3f}"


def rows(page: str, file: str) -> dict[str, str]:
    """{first column: second} of the table after the link to `file`."""
    table = page.partition(file)[2].partition("|\n\n")[0]
    cells = (line.strip("|").split(" | ") for line in table.splitlines() if line.startswith("| ") and line != "| | |")
    return {name.strip(): value.strip() for name, value in cells}


def test_the_table_of_the_whole_way():
    found = rows((ROOT / "docs" / "numbers.md").read_text(encoding="utf-8"), "spine-2-cores.json")
    parity = FIRST["parity"]
    apart = parity["nll"] - parity["nll_reference"]
    assert found == {
        "fields right on 64 held-out rows: base, tuned": told(FIRST["eval"], "score"),
        "held-out NLL, nats per token, in the second run: base, tuned": told(SECOND["nll"], "nll"),
        "merged against trained: held-out NLL over 5,017 answer tokens":
            f"{apart:.4f} nats per token (limit {parity['limit']}), KL {parity['kl_mean']:.3f}",
        "time, two runs": f"{FIRST['wall_s']} and {SECOND['wall_s']} s",
        "peak memory of all processes": f"{FIRST['peak_pss_mb'] / 1000:.1f} GB",
    }  # fmt: skip
    assert {parity["tokens"], *(one["tokens"] for one in SECOND["nll"])} == {5017}
    assert {one["items"] for one in FIRST["eval"]} == {64}


def test_its_minutes_memory_and_score_where_a_newcomer_reads_them():
    (taken,) = {round(run["wall_s"] / 60) for run in (FIRST, SECOND)}
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"takes {taken} minutes and {FIRST['peak_pss_mb'] / 1000:.1f} GB of memory" in readme
    assert f"fields right go from {told(FIRST['eval'], 'score').replace(', ', ' to ')}." in readme
    started = (ROOT / "docs" / "getting-started.md").read_text(encoding="utf-8")
    assert f"`make quickstart` takes {taken} minutes on two cores" in started
