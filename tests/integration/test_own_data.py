"""Rows in other forms than messages, for a base that has no chat template: trained, merged, proven and served with it.

A CSV with column names of its own and the `alpaca` template through a merged checkpoint and through an adapter on its
base; Parquet with tools, under the model's own template, asked by `verify` with them; plain text.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from tuneship.core import artifact, chat_templates
from tuneship.core.parity import read_reference
from tuneship.core.report import read_report
from tuneship.core.rundir import RunDir

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

RECIPE = """
name = "own"
[model]
id = "{model}"
dtype = "float32"
[data]
{data}
[lora]
rank = 8
[train]
effective_batch = 8
steps = {steps}
learning_rate = 1e-2
optimizer = "adamw"
[merge]
max_nll_increase = 1.0
[serve]
mode = "{mode}"
dtype = "float32"
port = 0
[bench.load]
workload = "heldout"
rates = [4]
duration_s = 2
output_tokens = 8
{bench}
"""
EVAL = """
[[bench.eval]]
task = "exact"
data = "asked.jsonl"
limit = 4
max_tokens = 12
"""
TABLE = """
train = "rows.csv"
heldout = "rows.csv"
columns = { instruction = "question", output = "answer" }
template = "alpaca"
"""
QWEN = (
    "{% if tools %}<|im_start|>system\n# Tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "<tool_call>JSON</tool_call><|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}<tool_call>{{ call['function'] | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}


@pytest.fixture
def untaught(tiny_model, tmp_path) -> Path:
    """The tiny model without a chat template."""
    return with_template(tiny_model, tmp_path / "untaught", "")


def with_template(model: Path, to: Path, text: str) -> Path:
    shutil.copytree(model, to)
    (to / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((to / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (to / "tokenizer_config.json").write_text(json.dumps(settings))
    if text:
        (to / "chat_template.jinja").write_text(text)
    return to


def table(folder: Path) -> None:
    """Rows, and the same as a task."""
    with (folder / "rows.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerows([["question", "answer"], *([f"say {number}", "as you\nwish"] for number in range(8))])
    asked = [{"role": "user", "content": "say 1"}, {"role": "assistant", "content": "as you\nwish"}]
    (folder / "asked.jsonl").write_text(json.dumps({"messages": asked}) + "\n")


def up(folder: Path, *words: str, **parts: object) -> tuple[RunDir, str]:
    """The run, and what was said."""
    (folder / "own.toml").write_text(RECIPE.format(**{"steps": 60, "mode": "merged", "bench": ""} | parts))
    command = [sys.executable, "-m", "tuneship", "up", "own.toml", *words]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=800)
    assert ran.returncode == 0, ran.stderr + ran.stdout
    return RunDir(folder / "runs" / "own"), ran.stderr + ran.stdout


def assert_proven(said: str) -> None:
    """`verify` passed before anybody was answered, and had compared how the server renders the prompts."""
    assert "the base would be" in said, said
    assert "not compared" not in said, said


def test_a_table_and_a_template_of_the_recipe_merged(untaught, tmp_path):
    table(tmp_path)
    run, said = up(tmp_path, model=untaught, data=TABLE, bench=EVAL)
    (adapter,) = run.artifacts.glob("adapter-*")
    (merged,) = run.artifacts.glob("merged-*")
    for path in (adapter, merged):
        record = artifact.read_manifest(path).template
        assert (record.source, record.text) == ("recipe", chat_templates.BUILTIN["alpaca"])
        assert (path / "chat_template.jinja").read_text() == record.text
    assert_proven(said)
    scores = {result.role: result.score for result in read_report(run.report).eval}
    assert scores["tuned"] == 1.0
    assert scores["base"] < 0.5
    (level,) = read_report(run.report).load
    assert level.completed > 0


def test_as_an_adapter_on_a_base_that_has_another_template(tiny_model, tmp_path):
    table(tmp_path)
    run, said = up(tmp_path, model=tiny_model, data=TABLE, bench=EVAL, mode="adapters")
    assert said.count("takes the place of the chat template that the model has") == 1
    assert_proven(said)
    scores = {result.role: result.score for result in read_report(run.report).eval}
    assert scores["tuned"] == 1.0, said
    assert scores["base"] < 0.5
    assert not list(run.path.glob("stages/serve/*/engine.log.base-*"))


def test_rows_with_tools_are_asked_with_them(tiny_model, tmp_path):
    model = with_template(tiny_model, tmp_path / "tooled", QWEN)
    call = {"type": "function", "function": {"name": "weather", "arguments": json.dumps({"city": "Rome"})}}
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"rain in Rome, {number}?"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "rain"},
                {"role": "assistant", "content": "yes it does rain there now"},
            ],
            "tools": json.dumps([WEATHER]),
        }
        for number in range(8)
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    run, said = up(tmp_path, model=model, data='train = "rows.parquet"\nheldout = "rows.parquet"')
    (merged,) = run.artifacts.glob("merged-*")
    kept = list(read_reference(merged / artifact.EVIDENCE))
    assert all(row.tools and row.tools[0]["function"]["name"] == "weather" for row in kept)
    assert_proven(said)


def test_plain_text_needs_no_template(untaught, tmp_path):
    rows = [{"text": f"{number} words that are said again and again"} for number in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = 'train = "rows.jsonl"\nheldout = "rows.jsonl"'
    run, said = up(tmp_path, "--bench.load.workload", "fixed", model=untaught, data=data)
    assert "not compared" in said
    assert "no load is sent to it" in said
    report = read_report(run.report)
    assert [result.role for result in report.nll] == ["base", "tuned"]
    (merged,) = run.artifacts.glob("merged-*")
    assert all(row.messages is None for row in read_reference(merged / artifact.EVIDENCE))
    assert artifact.read_manifest(merged).data.loss_tokens == artifact.read_manifest(merged).data.tokens
