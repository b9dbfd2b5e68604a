"""What of compressing needs no llm-compressor: scales that fit, files that are swapped, an environment that fails."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest

from tuneship.core.errors import ArtifactError, TrainError

pytest.importorskip("torch")


@pytest.mark.parametrize(("widths", "group"), [((256, 128), 128), ((576, 1536), 64), ((96, 128), 32)])
def test_the_largest_group_that_divides_every_row(tmp_path: Path, widths: tuple[int, ...], group: int):
    assert group_of(tmp_path, widths) == group


def test_rows_that_no_group_divides_are_refused_by_name(tmp_path: Path):
    with pytest.raises(ArtifactError, match=r"rows of \[100\] values have no common group") as caught:
        group_of(tmp_path, (100,))
    assert caught.value.hint == "merge.quantize = 'fp8'"


def group_of(folder: Path, widths: tuple[int, ...]) -> int:
    from tuneship.core import tensor_file
    from tuneship.core.tensor_file import Slot
    from tuneship.train.elsewhere.compress import _group
    from tuneship.train.merging.changes import Skeleton

    slots = {f"{width}.weight": Slot("U8", (2, width)) for width in (*widths, 10)}
    tensor_file.write(folder / "model.safetensors", slots, (bytes(slot.size) for slot in slots.values()))
    packed = frozenset(f"{width}.weight" for width in widths)
    return _group(folder, Skeleton("e.weight", "10.weight", tied=False, packed=packed))


def test_weights_are_swapped_and_the_text_s_files_stay(tmp_path: Path):
    from tuneship.train.elsewhere.compress import replace_weights

    merged, compressed = tmp_path / "merged", tmp_path / "fp8"
    for folder, names in (
        (merged, ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"]),
        (compressed, ["config.json", "model.safetensors", "recipe.yaml", "generation_config.json"]),
    ):
        folder.mkdir()
        for name in names:
            (folder / name).write_text(folder.name)
    replace_weights(merged, compressed)
    here = {file.name: file.read_text() for file in merged.iterdir()}
    assert here == {"config.json": "fp8", "model.safetensors": "fp8", "tokenizer.json": "merged"}


def test_a_program_that_fails_says_what_it_wrote_last(tmp_path: Path):
    from tuneship.train.elsewhere import own_environment

    program, log = tmp_path / "program.py", tmp_path / "log"
    program.write_text("import os, sys; print('it is', os.environ['SAID'], sys.argv[1]); sys.exit(3)")
    with pytest.raises(TrainError, match=r"program.py ended with code 3:\nit is full now") as caught:
        own_environment.run(Path(sys.executable), program, "now", log=log, env={"SAID": "full"})
    assert str(log) in caught.value.hint
    program.write_text("print('good')")
    own_environment.run(Path(sys.executable), program, log=log, env={})
    assert log.read_text() == "good\n"


def test_an_environment_is_built_once_and_never_left_half(tmp_path: Path, monkeypatch):
    """Of a package that is not there, so that no index is asked."""
    from tuneship.train.elsewhere import own_environment

    monkeypatch.setenv("TUNESHIP_CACHE", str(tmp_path / "cache"))
    absent = (str(tmp_path / "absent"),)
    for _ in range(2):
        with pytest.raises(TrainError, match="pip install"):
            own_environment.python("made", absent, extra="compress")
    (folder,) = (path for path in (tmp_path / "cache" / "environments").iterdir() if path.is_dir())
    (folder / ".complete").touch()
    assert own_environment.python("made", absent, extra="compress") == folder / "bin" / "python"


@pytest.mark.parametrize("extra", ["unsloth", "compress"])
def test_without_uv_the_extra_that_brings_it_is_named(tmp_path: Path, monkeypatch, extra: str):
    from tuneship.train.elsewhere import own_environment

    monkeypatch.setenv("TUNESHIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "env"))
    with pytest.raises(TrainError, match="needs uv") as caught:
        own_environment.python("made", ("absent",), extra=extra)
    assert caught.value.hint == f"pip install 'tuneship[{extra}]'"
    pyproject = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8"))
    assert any(line.startswith("uv") for line in pyproject["project"]["optional-dependencies"][extra])
