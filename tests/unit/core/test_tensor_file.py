"""Safetensors files that are written tensor by tensor: the library reads back what was given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open

from tuneship.core import tensor_file
from tuneship.core.tensor_file import Slot

DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "U8": "u1", "BOOL": "?"}
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        NAMES.filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    )
)
def test_what_is_written_is_read_back(tmp_path_factory, entries):
    path = tmp_path_factory.mktemp("file") / "a.safetensors"
    draw = np.random.default_rng(0)
    arrays = {name: draw.integers(0, 2, shape).astype(DTYPES[dtype]) for name, (dtype, shape) in entries.items()}
    slots = {name: Slot(dtype, tuple(shape)) for name, (dtype, shape) in entries.items()}
    tensor_file.write(path, slots, (array.tobytes() for array in arrays.values()))
    read = dict(deserialize(path.read_bytes()))
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (read[name]["dtype"], tuple(read[name]["shape"])) == slots[name]
        assert bytes(read[name]["data"]) == array.tobytes()


def test_it_says_that_it_is_torch_s_and_keeps_what_is_added(tmp_path: Path):
    for metadata in (None, {"format": "pt", "a": "b"}):
        tensor_file.write(tmp_path / "a", {"x": Slot("U8", (1,))}, [b"\1"], metadata)
        with safe_open(tmp_path / "a", framework="numpy") as file:
            assert file.metadata() == (metadata or {"format": "pt"})


@pytest.mark.parametrize("data", [[b"123"], [b"12345"], [], [b"1234", b"1234"]], ids=len)
def test_too_much_or_too_little_is_an_error_of_ours(tmp_path: Path, data: list[bytes]):
    with pytest.raises((AssertionError, ValueError)):
        tensor_file.write(tmp_path / "a", {"x": Slot("F32", (1,))}, data)
    if data != [b"1234", b"1234"]:
        with pytest.raises(SafetensorError), safe_open(tmp_path / "a", framework="numpy"):
            pass
