"""Held-out text of two reports: what is not the same rows, or too few, is never judged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tuneship.bench.compare.quality import Side, weigh_nll
from tuneship.core.report import NllResult


def side(folder: Path, nlls: list[float], tokens: int = 10, name: str = "nll.jsonl") -> Side[NllResult]:
    """A result of rows with these mean NLLs, and its items file in `folder`."""
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"index": i, "tokens": tokens, "nll": nll}) for i, nll in enumerate(nlls)]
    (folder / name).write_text("\n".join(lines), encoding="utf-8")
    mean = sum(nlls) / len(nlls)
    result = NllResult(
        data="h.jsonl", model="m", role="tuned", rows=len(nlls), tokens=tokens * len(nlls), nll=mean, stderr=0.03,
        items_file=name,
    )  # fmt: skip
    return Side(result, folder)


@pytest.mark.parametrize(("shift", "is_worse"), [(0.1, True), (-0.1, False)])
def test_the_same_rows_are_paired(tmp_path, shift: float, is_worse: bool):
    rows = [0.2 + 0.01 * (i % 7) for i in range(60)]
    found = weigh_nll(side(tmp_path / "a", rows), side(tmp_path / "b", [r + shift for r in rows]), 0.02, 0.05)
    assert not found.doubt
    assert found.worse_by == pytest.approx(shift)
    assert (found.p < 0.05) is is_worse
    assert (found.lower > 0.02) is is_worse
    assert found.pairs == 60


def test_a_candidate_that_was_not_measured(tmp_path):
    found = weigh_nll(side(tmp_path / "a", [0.2] * 60), None, 0.02, 0.05)
    assert found.doubt == "the candidate was not measured so"
    assert found.b is None


def test_rows_of_their_own_are_not_compared(tmp_path):
    a, b = side(tmp_path / "a", [0.2] * 60), side(tmp_path / "b", [0.2] * 60, tokens=11)
    assert weigh_nll(a, b, 0.02, 0.05).doubt == "the rows are not the same"
    assert weigh_nll(a, side(tmp_path / "c", [0.2] * 59), 0.02, 0.05).doubt == "the rows are not the same"


def test_without_its_rows_a_mean_says_too_little(tmp_path):
    a, b = side(tmp_path / "a", [0.2] * 60), side(tmp_path / "b", [0.9] * 60)
    b.file.unlink()
    assert weigh_nll(a, b, 0.02, 0.05).doubt == "the rows' own figures are gone"


def test_few_rows_are_no_ground_for_a_verdict(tmp_path):
    found = weigh_nll(side(tmp_path / "a", [0.2] * 3), side(tmp_path / "b", [0.9] * 3), 0.02, 0.05)
    assert found.doubt.startswith("3 rows, ")
    assert found.p == 1.0
