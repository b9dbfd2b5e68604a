"""Safetensors files read in one pass: their hash is of the bytes that were looked at, however those lie in blocks."""

from __future__ import annotations

import os
from io import BufferedReader
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from tuneship.core.errors import ArtifactError
from tuneship.core.files import sha256_file
from tuneship.serve import tensors

DTYPES = (np.float32, np.float16, np.int32)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 90), st.sampled_from(DTYPES)), max_size=8),
    block=st.integers(1, 40).map(lambda words: 4 * words),
    seed=st.integers(0, 2**32),
)
def test_a_file_is_hashed_and_looked_at_in_one(tmp_path_factory, sizes, block, seed):
    draw = np.random.default_rng(seed)
    written = {}
    for number, (size, dtype) in enumerate(sizes):
        # Extremes are rare: most tensors are ordinary, some hold one odd value anywhere, some are all zeros.
        values = draw.normal(size=size) * draw.choice([0, 1, 1])
        if size and dtype != np.int32 and draw.random() < 0.4:
            values[draw.integers(size)] = draw.choice([np.nan, -np.nan, np.inf, -np.inf, -0.0])
        written[f"t{number}"] = values.astype(dtype)
    file = tmp_path_factory.mktemp("read") / "x.safetensors"
    save_file(written, file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "_BLOCK", block)
        patch.setattr(tensors, "_AHEAD", 2)
        found = tensors.read(file)
    assert (found.size, found.sha256) == (file.stat().st_size, sha256_file(file))
    assert found.headers == tensors.headers(file)
    assert found.values == {
        key: (bool(np.isfinite(values).all()), not values.any())
        for key, values in written.items()
        if values.dtype != np.int32
    }


@pytest.mark.parametrize("by", [-64, 64])
def test_a_file_that_changes_its_length_meanwhile_is_refused(tmp_path: Path, monkeypatch, by: int):
    file = tmp_path / "x.safetensors"
    save_file({"x": np.ones(100, np.float32)}, file)
    header = tensors._header

    def and_then(opened: BufferedReader):
        found = header(opened)
        os.truncate(file, file.stat().st_size + by)
        return found

    # The header stands in the reader's buffer, and the data of so small a file with it.
    monkeypatch.setattr(Path, "open", lambda path, mode: open(path, mode, buffering=16))  # noqa: PTH123, SIM115
    monkeypatch.setattr(tensors, "_header", and_then)
    with pytest.raises(ArtifactError, match="it is being written to"):
        tensors.read(file)


def test_a_pipe_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(ArtifactError, match="is not a file"):
        tensors.read(tmp_path / "x.safetensors")
