"""What a review would count: files that can be read in one sitting."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[3]
ROOMS = ("tuneship", "train", "serve", "bench", "docs/makers", "recipes", "tests")


def test_no_file_of_code_is_over_400_lines():
    files = [file for room in ROOMS for file in (ROOT / room).rglob("*.py")]
    assert len(files) > 300
    lines = {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8").count("\n") for file in files}
    assert {name: count for name, count in lines.items() if count > 400} == {}
