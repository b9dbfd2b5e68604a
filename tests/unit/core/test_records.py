"""The other files between stages: what was written reads back, and a newer or foreign one is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tuneship.core import endpoint as endpoints
from tuneship.core import parity as parities
from tuneship.core import report as reports
from tuneship.core.endpoint import Endpoint, EngineInfo, ServedModel
from tuneship.core.errors import ArtifactError, EndpointError
from tuneship.core.parity import Parity, ReferenceRow
from tuneship.core.report import Report

PARITY = Parity(
    reference="trained",
    candidate="merged",
    rows=2,
    tokens=60,
    nll_base=2.0,
    nll_reference=0.5,
    nll=0.48,
    kl_mean=0.001,
    kl_p99=0.01,
    limit=0.02,
    passed=True,
)


def test_an_endpoint_reads_back(tmp_path: Path):
    model = ServedModel(name="sql", version="sql@0123", artifact_id="0123", base_id="org/base")
    written = Endpoint(
        url="http://127.0.0.1:1",
        mode="merged",
        pid=7,
        started_at="2026-01-01T00:00:00+00:00",
        engine=EngineInfo(version="0.5", flags=["--x"]),
        models=[model],
    )
    endpoints.write_endpoint(written, tmp_path / "endpoint.json")
    assert endpoints.read_endpoint(tmp_path / "endpoint.json") == written
    assert '"schema": 1' in (tmp_path / "endpoint.json").read_text()


def test_a_report_reads_back(tmp_path: Path):
    testbed = reports.Testbed.build(gpu="none", cpu="c", driver="", versions={"torch": "2"}, flags=["--x"])
    written = Report(name="sql", created_at="2026-01-01", testbed=testbed, parity=PARITY)
    reports.write_report(written, tmp_path / "report.json")
    assert reports.read_report(tmp_path / "report.json") == written


def test_a_testbeds_digest_is_over_all_of_it():
    one = {"gpu": "none", "cpu": "c", "driver": "", "versions": {"torch": "2"}, "flags": ["--x"]}
    same = reports.Testbed.build(**one).digest
    assert reports.Testbed.build(**one).digest == same
    others = [{"gpu": "H100"}, {"cpu": "d"}, {"driver": "1"}, {"versions": {}}, {"flags": []}]
    assert same not in {reports.Testbed.build(**(one | other)).digest for other in others}


READERS = (endpoints.read_endpoint, reports.read_report)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"schema": 2}', "has schema 2; this tuneship reads up to 1"),
        (b'{"schema": 1}', "cannot be read: .*: field required"),
        (b"[1]", "cannot be read: not a JSON object"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"", "cannot be read"),
    ],
)
def test_what_is_not_ours_is_refused(tmp_path: Path, read: Callable[[Path], object], content: bytes, says: str):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(EndpointError, match=says) as caught:
        read(path)
    assert str(path) in caught.value.message


@pytest.mark.parametrize("read", READERS)
def test_what_is_not_there_is_refused_with_a_hint(tmp_path: Path, read: Callable[[Path], object]):
    with pytest.raises(EndpointError, match=r"no (endpoint|report) at") as caught:
        read(tmp_path / "absent.json")
    assert "tuneship" in caught.value.hint


def test_reference_rows_read_back_in_order(tmp_path: Path):
    rows = [
        ReferenceRow(input_ids=[1, n], loss_mask=[0, 1], dtype="bfloat16", base=[0.0, -1.5], trained=[0.0, -0.25])
        for n in range(3)
    ]
    parities.write_reference(tmp_path / "evidence", rows)
    assert list(parities.read_reference(tmp_path / "evidence")) == rows


@pytest.mark.parametrize(
    ("line", "longest"),
    [(b"{}", 99), (b"\xff", 99), (b'{"input_ids": [1', 99), (b" " * 100, 99), (b"[" * 10**5, 10**6)],
)
def test_a_line_that_is_no_reference_row_is_named(tmp_path: Path, monkeypatch, line: bytes, longest: int):
    (tmp_path / "reference.jsonl").write_bytes(line)
    monkeypatch.setattr(parities, "LONGEST_ROW", longest)
    with pytest.raises(ArtifactError, match=r"reference\.jsonl:1 is not a reference row") as caught:
        list(parities.read_reference(tmp_path))
    assert caught.value.hint


def test_being_better_is_a_negative_increase():
    assert PARITY.nll_increase == pytest.approx(-0.02)
