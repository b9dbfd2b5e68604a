"""`tuneship serve` with something wrong: one clear error, and SGLang is never started."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tuneship.core import hardware
from tuneship.core.errors import ArtifactError, PreflightError, RecipeError
from tuneship.core.hardware import Gpu, Hardware
from tuneship.core.rundir import RunDir
from tuneship.serve import commands


def serve(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "tuneship", "serve", *arguments, "--log", str(cwd / "engine.log")]
    return subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


def refused(done: subprocess.CompletedProcess[str], cwd: Path) -> str:
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr
    assert not (cwd / "engine.log").exists(), "SGLang was started"
    return done.stderr


def test_a_port_in_use(base: Path, tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        said = refused(serve(str(base), "--port", str(port), cwd=tmp_path), tmp_path)
    assert f"port {port} on 127.0.0.1 is in use" in said
    assert "hint: choose another with --port" in said


def test_the_world_needs_a_key(base: Path, tmp_path: Path):
    said = refused(serve(str(base), "--host", "0.0.0.0", cwd=tmp_path), tmp_path)
    assert "there is no API key" in said
    assert "tuneship keys add" in said


def test_an_address_that_is_not_ours(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TUNESHIP_API_KEY", "a-key-of-sixteen-characters")
    assert "cannot be used" in refused(serve(str(base), "--host", "192.0.2.1", cwd=tmp_path), tmp_path)


def test_a_truncated_adapter(base: Path, seal_adapter, tmp_path: Path):
    sealed = seal_adapter("sql")
    weights = sealed.path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    said = refused(serve(str(base), "--adapters", str(sealed.path), cwd=tmp_path), tmp_path)
    assert "truncated" in said
    assert "adapter_model.safetensors" in said


def test_each_of_several_places_of_adapters_is_looked_at(base: Path, seal_adapter, make_adapter, tmp_path: Path):
    words = ("--adapters", str(seal_adapter("sql").path), "--adapters", str(make_adapter("sql")))
    assert "two models are called 'sql'" in refused(serve(str(base), *words, cwd=tmp_path), tmp_path)


@pytest.mark.parametrize("quantization", ["nf4", "dequantized"])
def test_names_are_looked_at_before_a_base_is_built(
    base: Path, make_adapter, tmp_path: Path, monkeypatch, quantization
):
    """Which takes minutes."""
    monkeypatch.setattr("tuneship.serve.quantized.run_job", lambda *_: pytest.fail("a base is built"))
    one, same = make_adapter("sql"), make_adapter("more/sql")
    for message, adapters, name in [
        ("two models are called 'sql'", [one, same], ""),
        ("'a b' cannot be the name of a served model", [make_adapter("a b")], ""),
        ("two models are called 'sql'", [one], "sql"),
        ("cannot be the name of a served model", [one], "a:b"),
    ]:
        with pytest.raises(PreflightError, match=message):
            commands.serve(str(base), adapters=adapters, name=name, quantization=quantization)
    with pytest.raises(ArtifactError, match="no directory"):
        commands.serve(str(base), adapters=[tmp_path / "nosuch"], quantization=quantization)


def test_a_run_that_merged_nothing(base: Path, seal_adapter, tmp_path: Path):
    run = RunDir(tmp_path)
    run.finish("train", "input", seal_adapter("sql").path, tmp_path / "stages" / "train" / "attempt-1")
    said = refused(serve(str(run.path), cwd=tmp_path), tmp_path)
    assert "is an adapter, not a model" in said
    assert "tuneship serve BASE --adapters" in said


def test_an_nf4_base_with_tensor_parallel(base: Path, tmp_path: Path):
    words = ("--quantization", "nf4", "--extra-arg=--tp-size", "--extra-arg=2")
    assert "tensor parallel 2" in refused(serve(str(base), *words, cwd=tmp_path), tmp_path)


@pytest.mark.parametrize("word", ["--host=0.0.0.0", "--log-requests", "--api-key"])
def test_an_argument_that_would_open_the_engine(base: Path, tmp_path: Path, word: str):
    said = refused(serve(str(base), f"--extra-arg={word}", cwd=tmp_path), tmp_path)
    assert f"SGLang is not given {word.partition('=')[0]}" in said
    assert "hint:" in said


def test_a_card_without_kernels_before_a_base_is_built(base: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tuneship.serve.quantized.run_job", lambda *_: pytest.fail("a base is built"))
    t4 = Hardware((Gpu("Tesla T4", 16 << 30, (7, 5)),), "580", "a processor", 4, 16 << 30)
    monkeypatch.setattr(hardware, "detect", lambda: t4)
    for quantization in ("none", "nf4"):
        with pytest.raises(PreflightError, match="does not serve on Tesla T4"):
            commands.serve(str(base), quantization=quantization)


def test_a_quantization_that_is_not_made_here(base: Path):
    with pytest.raises(RecipeError, match=r"^quantization = 'w4a16': no W4A16 weights are made here"):
        commands.serve(str(base), quantization="w4a16")


@pytest.mark.parametrize("values", [{"port": 70000}, {"max_rank": 0}, {"memory_fraction": 1.5}], ids=str)
def test_values_out_of_range(base: Path, values: dict):
    (name,) = values
    with pytest.raises(RecipeError, match=f"^--{name.replace('_', '-')}: "):
        commands.serve(str(base), **values)


def test_a_model_that_is_not_here():
    with pytest.raises(ArtifactError, match="no model 'no/such-model'"):
        commands.serve("no/such-model")
