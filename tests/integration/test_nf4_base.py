"""The NF4 base: written once, served with adapters on it, and trained on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tuneship.core.artifact import Artifact, open_artifact
from tuneship.core.cache import cache_dir
from tuneship.serve import catalog

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

ANSWER_TOKENS = 16
RECIPE = """
name = "counter"
[model]
id = "{model}"
[data]
train = "rows.jsonl"
heldout = "rows.jsonl"
[lora]
rank = 4
[train]
effective_batch = 4
steps = 2
optimizer = "adamw"
[merge]
max_nll_increase = 5.0
"""


def tuneship(*args: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "tuneship", *map(str, args)]
    return subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=200, check=False)


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory):
    """An empty cache: no base of an earlier test run is in it; only SGLang's bytecode is."""
    folder = tmp_path_factory.mktemp("cache")
    bytecode = cache_dir() / "bytecode"
    bytecode.mkdir(exist_ok=True)
    (folder / "bytecode").symlink_to(bytecode)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESHIP_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def server(own_cache, start_module_server, tiny_model, marker_adapters):
    """The tiny base as NF4, built on the way, and three adapters; float32, where equality can be had."""
    flags = ("--quantization", "nf4", "--adapters", str(marker_adapters), "--dtype", "float32")
    running = start_module_server(str(tiny_model), *flags)
    running.wait_ready()
    return running


@pytest.fixture(scope="module")
def nf4(server, own_cache) -> Artifact:
    """What the server has built."""
    (path,) = (own_cache / "bases").glob("base-nf4-*")
    return open_artifact(path, kind="base-nf4")


async def test_answers_are_those_of_the_packed_weights(
    server, nf4, ask_all, equal_share, markers, chats, tiny_model, marker_adapters
):
    prompts = chats(12, 41)
    asked = [(name, chat) for chat in prompts for name in (tiny_model.name, *markers)]
    answers = await ask_all(server.endpoint.url, asked, ANSWER_TOKENS)
    share = equal_share(nf4.path, marker_adapters, answers)
    print(f"equal to transformers + PEFT on the same NF4 weights, greedy, float32: {share}")
    assert share == dict.fromkeys((tiny_model.name, *markers), 1.0)
    for (name, _), answer in zip(asked, answers, strict=True):
        assert answer.text.startswith(markers.get(name, ""))

    # The test can fail: the 16-bit weights answer otherwise.
    from_base = [answer for answer in answers if answer.model == tiny_model.name]
    assert equal_share(tiny_model, marker_adapters, from_base)[tiny_model.name] < 1


def test_the_endpoint_says_what_it_serves(server, nf4, tiny_model):
    base, *_ = server.endpoint.models
    assert (base.name, base.artifact_id, base.base_id) == (tiny_model.name, nf4.manifest.content_id, str(tiny_model))
    assert base.version == f"{tiny_model.name}@{nf4.id12}"
    assert "--load-format" in server.endpoint.engine.flags


def test_it_is_built_once(nf4, tiny_model, tmp_path):
    again = tuneship("base", "build", tiny_model, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert Path(again.stdout.strip()) == nf4.path
    assert "unchanged" in again.stderr


@pytest.mark.slow
def test_what_is_trained_on_it_names_it_as_parent_and_merges_into_the_original(nf4, tiny_model, tmp_path, capsys):
    (tmp_path / "counter.toml").write_text(RECIPE.format(model=nf4.path))
    rows = [
        {"messages": [{"role": "user", "content": f"count {i}"}, {"role": "assistant", "content": f"it is {i}"}]}
        for i in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = tuneship("up", "counter.toml", "--until", "merge", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    artifacts = tmp_path / "runs" / "counter" / "artifacts"
    (adapter,) = artifacts.glob("adapter-*")
    manifest = open_artifact(adapter).manifest
    assert manifest.parents == (nf4.manifest.content_id,)
    assert manifest.base == nf4.manifest.base
    (merged,) = artifacts.glob("merged-*")
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())

    catalog.read(str(nf4.path), adapter)
    assert "can differ" not in capsys.readouterr().err
    catalog.read(str(tiny_model), adapter)
    assert "was trained on" in capsys.readouterr().err
