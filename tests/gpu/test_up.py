"""The whole way on a CUDA device, with the commands of the README. Not run where there is none, and said so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tuneship.core.hardware import detect
from tuneship.core.report import read_report

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not detect().gpus, reason="NOT RUN: this machine has no CUDA device"),
]

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("mode", ["merged", "adapters"])
def test_up_serves_what_it_trained(tmp_path, mode):
    command = [sys.executable, "-m", "tuneship", "up", str(REPOSITORY / "recipes" / "quickstart.toml")]
    command += ["--run", str(tmp_path / "run"), "--serve.mode", mode]
    subprocess.run(command, check=True, timeout=1800)
    report = read_report(tmp_path / "run" / "report.json")
    scores = {result.role: result.score for result in report.eval}
    assert scores["tuned"] >= scores["base"] + 0.5
    assert report.testbed.gpu != "none"
    assert all(level.completed == level.requests for level in report.load)
