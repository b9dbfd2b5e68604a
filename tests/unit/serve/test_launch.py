"""SGLang's command line, to the letter."""

from __future__ import annotations

from pathlib import Path

import pytest
from inline_snapshot import snapshot

from tuneship.core.hardware import Gpu, Hardware
from tuneship.core.recipe import Serve
from tuneship.serve.catalog import Catalog, Entry
from tuneship.serve.launch import LoadedAdapter, configure, environment, flags

CPU = Hardware((), "", "a processor", 2, 8 << 30)
H100 = Hardware((Gpu("NVIDIA H100", 80 << 30, (9, 0)),), "580", "a processor", 16, 128 << 30)

BASE = Entry("org/base", "org/base@0123456789ab", None, Path("/models/base"), "", "org/base")
LOADED = (
    LoadedAdapter("sql@3fa9c1d20b77#1", Path("/adapters/sql")),
    LoadedAdapter("b@1#7", Path("/adapters/b=c")),
    LoadedAdapter("hot@2#1", Path("/adapters/hot"), pinned=True),
)
ADAPTERS = Catalog("adapters", (BASE,))
COUNTERS = Path("/logs/engine.log.counters")
MERGED = Catalog("merged", (BASE._replace(name="invoice", path=Path("/runs/x/merged-3fa9")),))


def test_adapters_on_a_cpu():
    serve = Serve(mode="adapters", dtype="float32", max_loras=2, max_rank=16)
    config = configure(serve, ADAPTERS, CPU, 31000, LOADED)
    assert flags(config) == snapshot(
        [
            "--model-path",
            "/models/base",
            "--served-model-name",
            "org/base",
            "--host",
            "127.0.0.1",
            "--port",
            "31000",
            "--dtype",
            "float32",
            "--skip-server-warmup",
            "--enable-metrics",
            "--max-total-tokens",
            "20000",
            "--max-running-requests",
            "16",
            "--enable-lora",
            "--max-loras-per-batch",
            "3",
            "--max-lora-rank",
            "16",
            "--lora-target-modules",
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
            "--lora-paths",
            "sql@3fa9c1d20b77#1=/adapters/sql",
            "b@1#7=/adapters/b=c",
            '{"lora_name": "hot@2#1", "lora_path": "/adapters/hot", "pinned": true}',
        ]
    )


def test_adapters_that_are_still_to_come():
    words = flags(configure(Serve(mode="adapters"), ADAPTERS, CPU, 1))
    assert "--enable-lora" in words
    assert "--lora-paths" not in words


def test_a_merged_model_on_a_gpu():
    serve = Serve(context_length=4096, memory_fraction=0.8, extra_args=("--schedule-policy", "fcfs"))
    assert flags(configure(serve, MERGED, H100, 31000)) == snapshot(
        [
            "--model-path",
            "/runs/x/merged-3fa9",
            "--served-model-name",
            "invoice",
            "--host",
            "127.0.0.1",
            "--port",
            "31000",
            "--dtype",
            "bfloat16",
            "--skip-server-warmup",
            "--enable-metrics",
            "--context-length",
            "4096",
            "--mem-fraction-static",
            "0.8",
            "--schedule-policy",
            "fcfs",
        ]
    )


@pytest.mark.parametrize(
    ("serve", "catalog", "words"),
    [
        (Serve(), ADAPTERS._replace(weights="nf4"), "--quantization bitsandbytes --load-format bitsandbytes"),
        (Serve(quantization="fp8"), ADAPTERS, "--quantization fp8"),
    ],
    ids=["packed", "fp8"],
)
def test_quantization(serve: Serve, catalog: Catalog, words: str):
    assert words in " ".join(flags(configure(serve, catalog, H100, 31000)))
    assert "--quantization" not in flags(configure(Serve(), ADAPTERS, H100, 31000))


def test_tool_calls_are_read_as_the_template_writes_them(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{% if tools %}<tool_call>{% endif %}")
    catalog = Catalog("merged", (BASE._replace(path=tmp_path),))
    assert "--tool-call-parser qwen" in " ".join(flags(configure(Serve(), catalog, CPU, 31000)))
    assert "--tool-call-parser" not in flags(configure(Serve(), MERGED, CPU, 31000))


def test_the_engine_never_listens_where_the_door_does():
    config = configure(Serve(host="0.0.0.0", port=80), MERGED, H100, 31000)
    assert (config.host, config.port) == ("127.0.0.1", 31000)


@pytest.mark.parametrize(
    ("wanted", "hardware", "dtype"),
    [
        ("auto", H100, "bfloat16"),
        ("auto", CPU, "bfloat16"),
        ("float32", CPU, "float32"),
    ],
)
def test_dtype(wanted, hardware, dtype):
    assert configure(Serve(dtype=wanted), MERGED, hardware, 1).dtype == dtype


def test_sglang_takes_our_flags():
    """Every flag of ours is one that the installed SGLang knows: asked from its source, importing it takes 15 s."""
    from importlib.util import find_spec

    (sglang,) = find_spec("sglang").submodule_search_locations
    source = (Path(sglang) / "srt" / "server_args.py").read_text()
    serve = Serve(mode="adapters", context_length=1, memory_fraction=0.5)
    for word in flags(configure(serve, ADAPTERS, CPU, 1)):
        if word.startswith("--"):
            field = word.removeprefix("--").replace("-", "_")
            assert f"    {field}:" in source or f'"{word}"' in source, word


def test_environment_of_an_engine():
    config = configure(Serve(), MERGED, CPU, 1)
    assert environment(config, {}, COUNTERS) == {
        "TUNESHIP_ENGINE": "1",
        "PROMETHEUS_MULTIPROC_DIR": "/logs/engine.log.counters",
        "HF_HUB_OFFLINE": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    assert "OPENBLAS_NUM_THREADS" not in environment(configure(Serve(), MERGED, H100, 1), {}, COUNTERS)
    assert environment(config, {"HF_HUB_OFFLINE": "0"}, COUNTERS)["HF_HUB_OFFLINE"] == "0"
    assert environment(config, {"SGLANG_GRPC_PORT": "1234"}, COUNTERS)["SGLANG_GRPC_PORT"] == ""


def test_bytecode_is_kept_where_python_may_not_write_it_beside_the_sources(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNESHIP_CACHE", str(tmp_path))
    added = environment(configure(Serve(), MERGED, CPU, 1), {"PYTHONDONTWRITEBYTECODE": "1"}, COUNTERS)
    assert added["PYTHONDONTWRITEBYTECODE"] == ""
    assert added["PYTHONPYCACHEPREFIX"] == str(tmp_path / "bytecode")
