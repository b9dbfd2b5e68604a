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


def test_every_message_that_is_raised_is_on_the_page():
    """Read in another way than the page is made: by the beginnings of what follows `raise XError(`."""
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    raised = re.compile(
        r"""raise\ \w*(?:Error|Checkpointed|RegressionFound|Refusal|CannotScore)\(
            (?:\s*\d+,\s*"\w+",)?\s*f?(?P<quote>["'])(?:\{[^{}]*\})?(?P<words>[^"'{}]{10,})""",
        re.VERBOSE,
    )
    files = [file for room in ("tuneship", "train", "serve", "bench/tuneship") for file in (ROOT / room).rglob("*.py")]
    found = {
        (file.name, match["words"])
        for file in files
        for match in raised.finditer(file.read_text(encoding="utf-8"))
        if "sglang_plugin" not in file.parts
        and not re.search(r"raise \w*(Value|Type|Assertion|Lookup|Timeout)Error", match[0])
    }
    assert len(found) > 200
    assert sorted((name, words) for name, words in found if words.strip() not in page) == []


def test_the_error_that_the_page_begins_with_is_real(tmp_path: Path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/mine.toml").write_text(
        '[model]\nid = "x"\n[data]\ntrain = "y"\n[lora]\nrnak = 8\n', encoding="utf-8"
    )
    done = subprocess.run(
        [sys.executable, "-c", "from tuneship.cli.app import main; main()", "plan", "recipes/mine.toml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    assert said == re.findall(r"^    ((?:error|hint): .*)$", page, re.MULTILINE)


def test_every_package_of_the_lock_is_on_the_page_of_licences():
    """`make licences` writes it again."""
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    page = (ROOT / "docs/licences.md").read_text(encoding="utf-8")
    locked = set(re.findall(r"^([a-z0-9._-]+)==([^ ;\\]+)", lock, re.MULTILINE))
    assert set(re.findall(r"^\| (\S+) \| (\d\S*) \| ", page, re.MULTILINE)) == locked


@pytest.mark.parametrize("page", ["reference/recipe.md", "reference/cli.md", "troubleshooting.md", "hardware.md"])
def test_a_made_page_names_how_it_is_made(page: str):
    assert "make reference" in (ROOT / "docs" / page).read_text(encoding="utf-8")
