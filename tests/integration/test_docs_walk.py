"""The pages for readers, typed command by command in one folder; a tiny model has the bundled one's name."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.append(str(HERE))
import docs_pages  # noqa: E402
import docs_standin  # noqa: E402
import docs_walk  # noqa: E402

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

LIMIT_S = 180
TWO_READERS = (("getting-started", "serve-merged"), ("data", "train"))
"""Pages that need nothing of each other, and go on together on two cores; the rest follows."""


def test_the_pages_can_be_followed(tmp_path: Path):
    docs_walk.require_port()
    standin = docs_standin.build(docs_pages.ROOT / "recipes", tmp_path)
    # On a busy machine two threads that wait for each other make a tiny model ten times slower than one.
    environment = {**docs_walk.environment(standin.folder), **standin.environment, "OMP_NUM_THREADS": "1"}

    def follow(names: Sequence[str]) -> list[str]:
        pages = [page for page in docs_pages.WALKED if page.stem in names]
        failed = []
        for outcome in docs_walk.walk(pages, standin.folder, environment, LIMIT_S, reader=names[0]):
            print(docs_walk.line(outcome), flush=True)
            if outcome.problem:
                failed.append(f"{docs_walk.line(outcome)}\n{docs_walk.complaint(outcome)}")
        return failed

    with ThreadPoolExecutor(len(TWO_READERS)) as pool:
        failed = [problem for found in pool.map(follow, TWO_READERS) for problem in found]
    before = {name for names in TWO_READERS for name in names}
    failed += follow([page.stem for page in docs_pages.WALKED if page.stem not in before])
    assert not failed, "\n".join(failed)


def test_what_goes_wrong_is_seen(tmp_path: Path):
    page = tmp_path / "page.md"
    lines = ("false", "true    # exit 1", "sleep 60", "# Ctrl-C in its terminal", "kept=words", 'echo "$kept"')
    page.write_text("".join(f"    {line}\n" for line in lines) + "\n```text\nother words\n```\n", encoding="utf-8")
    outcomes = list(docs_walk.walk([page], tmp_path, docs_walk.environment(tmp_path), 1.0))
    assert [outcome.problem for outcome in outcomes] == [
        "exit 1, not 0",
        "exit 0, not 1",
        "still running after 1 s",
        "nothing runs",
        "",
        "it does not say 'other words'",
    ]
    assert outcomes[-1].printed == "words\n"


def test_another_way_to_start_tuneship(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("    tuneship serve BASE\n    tuneship up RECIPE\n    tuneship top --once\n", encoding="utf-8")
    environment = docs_walk.environment(tmp_path, "echo started:", "--attention-backend triton")
    outcomes = docs_walk.walk([page], tmp_path, environment, 10.0)
    assert [outcome.printed.strip() for outcome in outcomes] == [
        "started: serve BASE --extra-arg=--attention-backend --extra-arg=triton",
        'started: up RECIPE --serve.extra_args ["--attention-backend", "triton"]',
        "started: top --once",
    ]
