"""Files are whole or not there; hashes are those of the bytes."""

from __future__ import annotations

import hashlib
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneship.core import files

FILL = """
import resource, signal, sys
from pathlib import Path
from tuneship.core.files import write_atomic
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_atomic(Path(sys.argv[1]), "x" * 100_000)
except OSError as error:
    print(error.errno)
"""


def test_writing_replaces_the_whole_content(tmp_path: Path):
    path = tmp_path / "state.json"
    files.write_atomic(path, "a long first content")
    files.write_atomic(path, "zwölf")
    assert path.read_text(encoding="utf-8") == "zwölf"
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_half_way_leaves_the_old_content(tmp_path: Path):
    """A limit on the file's size stands for a full disk."""
    path = tmp_path / "state.json"
    path.write_text("old")
    done = subprocess.run([sys.executable, "-c", FILL, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "27"
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4096


def test_text_that_cannot_be_encoded_leaves_nothing(tmp_path: Path):
    with pytest.raises(UnicodeEncodeError):
        files.write_atomic(tmp_path / "x", "\ud800")
    assert list(tmp_path.iterdir()) == []


def test_a_tree_is_flushed_with_everything_in_it(tmp_path: Path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_text("x")
    files.sync_tree(tmp_path)
    with pytest.raises(FileNotFoundError):
        files.sync_directory(tmp_path / "absent")


@given(content=st.binary(max_size=200))
def test_a_files_hash_is_its_bytes_hash(tmp_path_factory: pytest.TempPathFactory, content: bytes):
    path = tmp_path_factory.getbasetemp() / "hashed"
    path.write_bytes(content)
    assert files.sha256_file(path) == hashlib.sha256(content).hexdigest()


NAME = st.text(st.characters(exclude_characters="\t\n", exclude_categories=("Cs",)), max_size=5)
ENTRY = st.tuples(NAME, st.integers(0, 99), st.just("ab"))


@given(entries=st.lists(ENTRY, max_size=5, unique=True), shuffled=st.randoms())
def test_a_listings_hash_does_not_depend_on_order_but_on_everything_else(entries: list, shuffled):
    mixed = list(entries)
    shuffled.shuffle(mixed)
    assert files.sha256_listing(mixed) == files.sha256_listing(entries)
    for number, (path, size, digest) in enumerate(entries):
        for other in ((path + "x", size, digest), (path, size + 1, digest), (path, size, digest + "c")):
            assert files.sha256_listing([*entries[:number], other, *entries[number + 1 :]]) != files.sha256_listing(
                entries
            )


def test_a_path_for_a_reader_is_the_shorter_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert files.short(tmp_path / "runs" / "sql") == "runs/sql"
    assert files.short(Path("runs/sql")) == "runs/sql"
    deep = tmp_path / "/".join("abcdefghijklmnop")
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    assert files.short(Path("/etc/hosts")) == "/etc/hosts"
