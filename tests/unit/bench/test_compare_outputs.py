"""What a CI job reads."""

from xml.etree import ElementTree as ET

from tuneship.bench.compare.outputs import cells, write_junit, write_markdown
from tuneship.core.report import Comparison

ROWS = [
    Comparison(metric="TTFT <p50>", a=1, b=1.2, ratio=1.2, worse_by=0.2, ci=(0.1, 0.3), verdict="regressed"),
    Comparison(metric="E2E | p50", a=1, b=1, ratio=1, worse_by=0.0, verdict="no worse than the margin"),
    Comparison(
        metric="sql",
        a=0.9,
        b=0.88,
        ratio=0.98,
        unit="points",
        worse_by=0.02,
        verdict="cannot tell",
        reason="too few",
        next_step="--limit 400",
    ),
]


def test_junit(tmp_path) -> None:
    write_junit(ROWS, tmp_path / "junit.xml")
    suite = ET.parse(tmp_path / "junit.xml").getroot()
    assert [suite.get(name) for name in ("tests", "failures", "errors")] == ["3", "1", "1"]
    assert [(case.get("name"), [child.tag for child in case]) for case in suite] == [
        ("TTFT <p50>", ["failure"]),
        ("E2E | p50", []),
        ("sql", ["error"]),
    ]
    assert suite[2][0].text == "cannot tell: too few (to decide: --limit 400)"


def test_markdown(tmp_path) -> None:
    write_markdown(ROWS, tmp_path / "summary.md")
    lines = (tmp_path / "summary.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 5
    assert lines[2] == "| TTFT <p50> | 1 | 1.2 | +20.0% | +10.0% .. +30.0% | - | regressed |"
    assert lines[3].startswith(r"| E2E \| p50 |")
    assert "+2.0 points" in lines[4]


def test_a_terminal_leaves_out_what_one_command_decides() -> None:
    command = ROWS[2].model_copy(update={"next_step": "tuneship bench compare a b --pairs 15"})
    assert cells(command, brief=True)[-1] == "cannot tell: too few"
    assert cells(ROWS[2], brief=True)[-1] == "cannot tell: too few (to decide: --limit 400)"
