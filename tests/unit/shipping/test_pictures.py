"""The pictures of the README and the docs load nothing, show no path of a private machine, and are light."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

ROOT = Path(__file__).parents[3]
IMAGES = ROOT / "docs" / "images"
PAGES = (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
SHOWN = {
    (page.parent / name).resolve()
    for page in PAGES
    for name in re.findall(r"!\[[^\]]+\]\(([^):]+)\)", page.read_text(encoding="utf-8"))
}
DRAWN = sorted(IMAGES.glob("*.svg"))


def test_all_are_shown_and_light():
    assert set(IMAGES.iterdir()) == SHOWN
    assert {file.name: file.stat().st_size for file in IMAGES.iterdir() if file.stat().st_size > 250_000} == {}


@pytest.mark.parametrize("file", DRAWN, ids=lambda file: file.name)
def test_a_drawing_is_text_alone(file: Path):
    text = file.read_text(encoding="utf-8")
    names = {element.tag.rpartition("}")[2] for element in ET.fromstring(text).iter()}
    assert names <= {"svg", "style", "defs", "clipPath", "rect", "circle", "g", "text"}
    assert re.findall(r"url\((?!#)|@import|@font-face|href|http(?!://(?:www\.w3\.org|127\.0\.0\.1))", text) == []


@pytest.mark.parametrize("file", DRAWN, ids=lambda file: file.name)
def test_a_terminal_shows_no_path_of_a_private_machine(file: Path):
    shown = "\n".join(element.text or "" for element in ET.fromstring(file.read_text(encoding="utf-8")).iter())
    paths = {path for path in re.findall(r"(?<![\w./:])/\w[\w./-]*", shown) if not path.startswith("/tmp/tuneship/")}
    assert paths == set()


def test_a_page_is_shown_sharp():
    head = (IMAGES / "report.png").read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", head[16:])
    assert width >= 1500
    assert height <= 1.2 * width
