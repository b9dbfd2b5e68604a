"""A small real artifact, and the manifest that it is sealed with."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tuneship.core.artifact import Artifact, Base, Manifest, QuantizationRecord, TemplateRecord, draft, seal

Write = Callable[..., Path]


@pytest.fixture
def manifest() -> Manifest:
    return Manifest(
        kind="adapter",
        name="sql",
        input_id="1" * 64,
        base=Base(id="org/base", revision="main", weights_sha256="a" * 64, architecture="LlamaForCausalLM"),
        quantization=QuantizationRecord(method="nf4", double=True, compute_dtype="bfloat16"),
        template=TemplateRecord(text="{{ messages }}", sha256="c" * 64, source="model"),
        end_token_ids=(2,),
        tokenizer_sha256="b" * 64,
    )


@pytest.fixture
def sealed(tmp_path: Path, manifest: Manifest) -> Artifact:
    """An adapter of three files, one of them in a folder."""
    with draft(tmp_path / "artifacts") as work:
        (work / "adapter_config.json").write_text('{"r": 16}')
        (work / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 40)
        (work / "extra").mkdir()
        (work / "extra" / "notes.txt").write_text("hello")
        return seal(work, manifest)


@pytest.fixture
def write_recipe(tmp_path: Path) -> Write:
    """Write a recipe of the two necessary keys and `text`; returns its path."""

    def write(text: str = "", *, model: str = 'id = "org/base"', data: str = 'train = "train.jsonl"') -> Path:
        path = tmp_path / "recipe.toml"
        path.write_text(f"[model]\n{model}\n[data]\n{data}\n{text}\n", encoding="utf-8")
        return path

    return write


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("cannot mount a small tmpfs (needs root): the full disk is not tested")
    try:
        yield mount
    finally:
        subprocess.run(["umount", "--lazy", mount], check=True)
