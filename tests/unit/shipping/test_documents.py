"""The pages that are made from the code say what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def test_no_page_is_stale():
    """`make reference` writes them again."""
    done = subprocess.run(
        [sys.executable, "docs/makers", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_option_of_every_verb_says_what_it_is():
    page = (ROOT / "docs/reference/cli.md").read_text(encoding="utf-8")
    options = re.findall(r"^\* `([^`]+)`(.*)$", page, re.MULTILINE)
    assert len(options) > 100
    assert [name for name, text in options if not re.match(r": \w", text)] == []


def test_a_link_between_pages_leads_to_a_file():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    dead = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in pages
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert dead == []


@pytest.mark.parametrize("page", ["reference/recipe.md", "reference/cli.md"])
def test_a_made_page_names_how_it_is_made(page: str):
    assert "make reference" in (ROOT / "docs" / page).read_text(encoding="utf-8").split("\n## ")[0]
