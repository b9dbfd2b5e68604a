"""The docs' commands that need no network, no engine and no minutes, run: a tiny model stands for the recipe's.

Training, serving and measuring run in tests/integration/test_docs_walk.py; test_commands_executed.py counts both.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest

from tuneship.cli.app import app
from tuneship.core import report as reports
from tuneship.core.errors import EndpointError, RegistryError, RegressionFound
from tuneship.core.report import ClientHealth, LoadResult, Percentiles, Report, write_report

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\|", "|")


@pytest.fixture
def shell(tmp_path, tiny_model, monkeypatch, capsys):
    """Run a command that a page holds, in an empty folder with the quickstart's rows; what it printed."""
    quickstart = tomllib.loads((ROOT / "recipes/quickstart.toml").read_text(encoding="utf-8"))
    data = {name: str(ROOT / "recipes" / quickstart["data"][name]) for name in ("train", "heldout")}
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'name = "tiny"\n[model]\nid = "{tiny_model}"\n'
        f'[data]\ntrain = "{data["train"]}"\nheldout = "{data["heldout"]}"\n',
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNESHIP_KEYS", str(tmp_path / "keys.toml"))
    monkeypatch.setenv("TUNESHIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TUNESHIP_ADMIN_KEY", raising=False)

    def run(command: str, page: str = README, more: Sequence[str] = ()) -> str:
        assert command in page, f"no page says {command!r}"
        words = command.replace("RECIPE", str(recipe)).removeprefix("tuneship ").split()
        app([*words, *more], result_action="return_value")
        return str(capsys.readouterr().out)

    return run


def test_what_would_happen(shell):
    resolved, _, plan = shell("tuneship up RECIPE --dry-run").partition("plan")
    assert tomllib.loads(resolved)["name"] == "tiny"
    assert "KV cache" in plan
    assert "KV cache" in shell("tuneship plan RECIPE")


def test_rows(shell):
    assert "every row can be used" in shell("tuneship data check RECIPE")
    assert json.loads(shell("tuneship data check RECIPE", more=["--json"]))["train"]["rows"] > 100
    assert re.search(r"--- .*train\.jsonl:1, \d+ tokens, \d+ with loss", shell("tuneship data show RECIPE"))


def test_keys(shell, tmp_path):
    secret = shell("tuneship keys add NAME --models sql,invoice").strip()
    assert secret.startswith("ts-")
    stored = (tmp_path / "keys.toml").read_text(encoding="utf-8")
    assert tomllib.loads(stored)["keys"]["NAME"]["models"] == ["sql", "invoice"]
    assert secret not in stored
    serve = (ROOT / "serve/README.md").read_text(encoding="utf-8")
    shell("tuneship keys add ci --models sql,invoice", serve)
    shell("tuneship keys revoke ci", serve)
    assert set(tomllib.loads((tmp_path / "keys.toml").read_text(encoding="utf-8"))["keys"]) == {"NAME"}


def test_a_version_is_taken_out_without_a_server(shell):
    page = (ROOT / "docs/jobs/serve-adapters.md").read_text(encoding="utf-8")
    with pytest.raises(RegistryError, match="there is no registry in FOLDER"):
        shell("tuneship adapters unload NAME --state FOLDER", page)


@pytest.mark.parametrize("command", ["tuneship adapters promote sql", "tuneship adapters rollback sql", "tuneship top"])
def test_verbs_of_a_running_server_say_that_none_runs(shell, command: str):
    with pytest.raises(EndpointError, match="no server is running"):
        shell(command)


def test_reports(shell, tmp_path):
    for name, ttft_ms in (("baseline", 20.0), ("candidate", 90.0)):
        (tmp_path / name).mkdir()
        write_report(_report(name, ttft_ms), tmp_path / name / "report.json")
    bench = (ROOT / "bench/README.md").read_text(encoding="utf-8")
    with pytest.raises(RegressionFound, match=r"regressed: .*TTFT"):
        shell("tuneship bench compare baseline/ candidate/", bench)
    (tmp_path / "runs").mkdir()
    (tmp_path / "baseline").rename(tmp_path / "runs/baseline")
    assert "baseline" in shell("tuneship bench history")


def _report(name: str, ttft_ms: float) -> Report:
    figures = {key: Percentiles(p50=value, p90=value, p95=value, p99=value, mean=value) for key, value in (
        ("ttft_ms", ttft_ms), ("tpot_ms", 3.0), ("itl_ms", 3.0), ("e2e_ms", 200.0 + ttft_ms),
    )}  # fmt: skip
    level = LoadResult(
        workload="fixed",
        model="m",
        arrivals="poisson",
        rate=4,
        requests=100,
        completed=100,
        duration_s=30,
        input_tokens=6400,
        output_tokens=6400,
        output_tokens_per_s=213.0,
        client=ClientHealth(lag_p99_ms=0.1, valid=True),
        **figures,
    )
    testbed = reports.Testbed.build(gpu="none", cpu="cpu", driver="", versions={}, flags=[])
    return Report(name=name, created_at="2026-11-25T00:00:00+00:00", testbed=testbed, load=[level])
