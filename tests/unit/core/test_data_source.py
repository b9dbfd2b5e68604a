"""What data.train names: files, folders, data sets of the hub; and what identifies each."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuneship.core import data_source
from tuneship.core.data_source import Folder, HubData
from tuneship.core.errors import DataError
from tuneship.core.identity import data_sha256

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached(tmp_path, monkeypatch) -> Path:
    """A data set in the hub's cache, laid out as huggingface_hub does."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub" / "datasets--owner--name" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    refs = tmp_path / "hub" / "datasets--owner--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    (snapshot / "train.jsonl").write_text('{"text": "a"}\n')
    return snapshot


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("hub:owner/name", HubData("owner/name", "", "", "")),
        ("hub:owner/name:test", HubData("owner/name", "", "", "test")),
        ("hub:owner/na.me-2/config@refs/pr/1:train", HubData("owner/na.me-2", "config", "refs/pr/1", "train")),
        ("/data/train.jsonl", None),
    ],
)
def test_a_data_set_of_the_hub(pattern, wanted):
    assert data_source.hub(pattern) == wanted


@pytest.mark.parametrize("pattern", ["hub:", "hub:name", "hub:a/b/c/d", "hub:a/b:"])
def test_what_is_no_id_is_refused(pattern):
    with pytest.raises(DataError, match="is no data set of the hub"):
        data_source.hub(pattern)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", ""),
        ("rows.jsonl", "{root}/rows.jsonl"),
        ("data/rows.jsonl", "{root}/data/rows.jsonl"),
        ("data/*.jsonl", "{root}/data/*.jsonl"),
        ("../rows", "{up}/rows"),
        ("owner/name", "hub:owner/name"),
        ("owner/name:test", "hub:owner/name:test"),
        ("hub:data/saved", "hub:data/saved"),
        ("data/saved", "{root}/data/saved"),
        ("data/saved:test", "{root}/data/saved:test"),
        ("data/missing", "{root}/data/missing"),
        ("owner/name/config", "{root}/owner/name/config"),
        ("owner/name.csv", "{root}/owner/name.csv"),
    ],
)
def test_a_path_is_made_absolute_and_an_id_stays(tmp_path, text, wanted):
    (tmp_path / "data" / "saved").mkdir(parents=True)
    made = data_source.absolute(text, tmp_path)
    assert made == wanted.format(root=tmp_path, up=tmp_path.parent)
    assert data_source.absolute(made, Path("/elsewhere")) == made


def test_files_are_sorted_and_folders_are_folders(tmp_path):
    for name in ("b.csv", "a.csv"):
        (tmp_path / name).touch()
    assert data_source.locate(f"{tmp_path}/*.csv") == [tmp_path / "a.csv", tmp_path / "b.csv"]
    assert data_source.locate(str(tmp_path)) == Folder(tmp_path)
    assert data_source.locate(f"{tmp_path}:test") == Folder(tmp_path, split="test")
    with pytest.raises(DataError, match="no data file at"):
        data_source.locate(f"{tmp_path}/c.csv")


def test_a_cached_data_set_is_its_snapshot(cached):
    assert data_source.locate("hub:owner/name") == Folder(cached, revision=COMMIT, id="owner/name")
    assert data_source.locate(f"hub:owner/name@{COMMIT}:train").split == "train"
    assert data_source.is_here("hub:owner/name")


@pytest.mark.usefixtures("cached")
def test_one_that_is_not_cached_is_one_clear_error():
    with pytest.raises(DataError, match="no data set 'owner/other': not in the hub cache") as caught:
        data_source.locate("hub:owner/other")
    assert "where the hub can be reached" in caught.value.hint
    assert not data_source.is_here("hub:owner/other")


def test_the_commit_and_the_split_identify_what_is_the_hubs(cached):
    before = data_sha256("hub:owner/name")
    (cached / "train.jsonl").write_text("anything")  # whoever changes the cache by hand is on their own
    assert data_sha256("hub:owner/name") == before
    assert data_sha256("hub:owner/name:test") != before
    moved = cached.rename(cached.with_name(COMMIT[::-1]))
    (moved.parents[1] / "refs" / "main").write_text(moved.name)
    assert data_sha256("hub:owner/name") != before


def test_bytes_names_and_the_split_identify_a_folder(tmp_path):
    folder = tmp_path / "one"
    (folder / "part").mkdir(parents=True)
    file = folder / "part" / "rows.arrow"
    file.write_bytes(b"1")
    before = data_sha256(str(folder))
    assert data_sha256(f"{folder}:test") != before
    assert data_sha256(str(folder.rename(tmp_path / "two"))) == before
    file = tmp_path / "two" / "part" / "rows.arrow"
    file.write_bytes(b"2")
    assert data_sha256(str(tmp_path / "two")) != before
    file.write_bytes(b"1")
    file.rename(file.with_name("other.arrow"))
    assert data_sha256(str(tmp_path / "two")) != before
