"""`tuneship bench history`: past reports in order, unreadable ones named, each testbed in a colour of its own."""

import pytest

from tuneship.bench.report.commands import history
from tuneship.bench.report.history import collect
from tuneship.core.report import Knee, write_report


@pytest.fixture
def reports(make_report, make_level, tmp_path, monkeypatch):
    """An old report, a newer one of another testbed, a broken one, one where nothing was measured."""
    monkeypatch.chdir(tmp_path)
    other = make_report().testbed.build(gpu="H100", cpu="c", driver="1", versions={}, flags=[])
    made = {
        "runs/b": make_report(name="newer", created_at="2026-02-01 00:00:00 UTC", testbed=other),
        "runs/deep/a": make_report(name="older", created_at="2026-01-01 00:00:00 UTC"),
        "bench-x": make_report(name="bare", created_at="2026-03-01 00:00:00 UTC", load=[], eval=[]),
        "elsewhere": make_report(name="elsewhere"),
    }
    for folder, report in made.items():
        (tmp_path / folder).mkdir(parents=True)
        write_report(report, tmp_path / folder / "report.json")
    (tmp_path / "runs/broken").mkdir()
    (tmp_path / "runs/broken/report.json").write_text("{")
    return tmp_path


def test_lists_by_time_and_names_what_it_skips(reports, capsys) -> None:
    history()
    said = capsys.readouterr()
    names = ["older", "newer", "bare"]
    places = [said.out.index(name) for name in names]
    assert places == sorted(places)
    assert "elsewhere" not in said.out
    assert "skipped" in said.err
    assert "broken" in said.err


def test_folders_may_be_named_and_overlap(reports) -> None:
    found = collect([reports / "elsewhere", reports, reports / "runs"])
    assert sorted(row.name for row in found.rows) == ["bare", "elsewhere", "newer", "older"]
    assert len(found.skipped) == 1


def test_figures_are_those_of_the_heaviest_valid_level(make_report, make_level, tmp_path) -> None:
    lagging = make_level(16, client={"lag_p99_ms": 90.0, "valid": False})
    report = make_report(
        load=[make_level(1), make_level(4), make_level(8), lagging], knee=Knee(rate=4, beyond=8, reason="r")
    )
    write_report(report, tmp_path / "report.json")
    row = collect([tmp_path]).rows[0]
    assert (row.score, row.ttft_ms, row.tpot_ms, row.tokens_per_s) == (0.9, 84.0, 21.5, 85.3)


def test_page_has_a_colour_a_testbed(reports) -> None:
    history(html=reports / "history.html")
    page = (reports / "history.html").read_text().split("<script>", maxsplit=1)[0]
    assert page.count("<i style=") == 2
    for chart in ("score", "ttft_ms", "tpot_ms", "tokens_per_s"):
        assert f'id="{chart}"' in page


def test_nothing_found_is_said(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    history()
    assert "no reports found" in capsys.readouterr().err
