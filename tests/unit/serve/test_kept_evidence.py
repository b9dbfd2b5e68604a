"""What of an adapter's evidence is copied, and what is refused: the adapter is anybody's."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.unit.serve.conftest import unreadable
from tuneship.core.artifact import Artifact
from tuneship.core.errors import ArtifactError, PreflightError, RegistryError
from tuneship.serve import kept_evidence
from tuneship.serve.kept_evidence import KeptEvidence, files_of
from tuneship.serve.registry import State, Version


@pytest.fixture
def sealed(seal_adapter) -> Artifact:
    made = seal_adapter("sql")
    made.evidence.mkdir()
    (made.evidence / "reference.jsonl").write_text("{}\n")
    return made


@pytest.fixture
def kept(tmp_path: Path) -> KeptEvidence:
    return KeptEvidence(tmp_path / "kept")


def version(tmp_path: Path) -> Version:
    return Version("sql", "a" * 64, "b", tmp_path / "a-1", State.CHECKED, 0.0, 1, False, "", "")


def test_only_what_verify_reads_is_kept(sealed, kept, tmp_path):
    for name in ("deferred-1.json", "deferred-2.json", "parity-1.json", "deferred-1.json.odd"):
        (sealed.evidence / name).write_text(name)
    (sealed.evidence / "zero").symlink_to("/dev/zero")  # without an end
    (sealed.evidence / "all").symlink_to("/", target_is_directory=True)
    os.mkfifo(sealed.evidence / "pipe")  # without a beginning
    kept.keep(version(tmp_path), sealed.path, files_of(sealed.path), [])
    folder = kept.of(version(tmp_path))
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) == [
        "artifact.json",
        "evidence",
        "evidence/deferred-2.json",
        "evidence/reference.jsonl",
    ]
    assert files_of(folder) == [folder / path.relative_to(sealed.path) for path in files_of(sealed.path)]


@pytest.mark.parametrize("name", ["artifact.json", "evidence/reference.jsonl", "evidence/deferred-1.json"])
def test_a_link_out_of_the_directory_is_refused(sealed, tmp_path, name):
    (tmp_path / "secret").write_text("{}")
    (sealed.path / name).unlink(missing_ok=True)
    (sealed.path / name).symlink_to(tmp_path / "secret")
    with pytest.raises(PreflightError, match=f"{Path(name).name} is a link that leaves its directory"):
        files_of(sealed.path)


def test_a_link_of_the_whole_folder_is_refused(sealed, tmp_path):
    shutil.move(sealed.evidence, tmp_path / "elsewhere")
    sealed.evidence.symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with pytest.raises(PreflightError, match=r"reference\.jsonl is a link that leaves its directory"):
        files_of(sealed.path)


def test_a_link_inside_is_as_good_as_a_file(sealed, kept, tmp_path):
    (sealed.evidence / "reference.jsonl").rename(sealed.evidence / "held-out.jsonl")
    (sealed.evidence / "reference.jsonl").symlink_to("held-out.jsonl")
    kept.keep(version(tmp_path), sealed.path, files_of(sealed.path), [])
    copy = kept.of(version(tmp_path)) / "evidence" / "reference.jsonl"
    assert not copy.is_symlink()
    assert copy.read_text() == "{}\n"


@pytest.mark.parametrize("odd", ["folder", "pipe", "a link to itself"])
def test_what_is_no_file_is_refused(sealed, odd):
    file = sealed.evidence / "reference.jsonl"
    file.unlink()
    {"folder": file.mkdir, "pipe": lambda: os.mkfifo(file)}.get(odd, lambda: file.symlink_to(file))()
    with pytest.raises(ArtifactError, match=r"reference\.jsonl is not a file"):
        files_of(sealed.path)


def test_more_than_anybody_reads_is_refused(sealed):
    left = sealed.evidence / "deferred-1.json"
    left.touch()
    most = kept_evidence.LARGEST_BYTES - (sealed.path / "artifact.json").stat().st_size - len("{}\n")
    os.truncate(left, most)  # takes no room
    assert left in files_of(sealed.path)
    os.truncate(left, most + 1)
    with pytest.raises(ArtifactError, match=f"holds {kept_evidence.LARGEST_BYTES + 1} bytes"):
        files_of(sealed.path)


def test_a_folder_without_evidence_leaves_none(make_adapter, kept, tmp_path):
    plain = make_adapter("plain")
    assert files_of(plain) == files_of(tmp_path / "nosuch") == []
    kept.keep(version(tmp_path), plain, files_of(plain), [])
    assert not kept.of(version(tmp_path)).exists()


def test_a_folder_that_cannot_be_read_is_an_error_that_says_so(sealed, kept, tmp_path):
    kept.keep(version(tmp_path), sealed.path, files_of(sealed.path), [])
    folder = kept.of(version(tmp_path)).parent
    for sweep in (kept.sweep, kept.strangers):
        with unreadable(folder), pytest.raises(RegistryError, match=f"{folder} cannot be read: Permission") as caught:
            sweep(set())
        assert "may this user read" in caught.value.hint
    kept.sweep(set())
    assert not list(folder.iterdir())


def test_why_it_cannot_be_copied_is_said_where_the_system_has_no_words(sealed, kept, tmp_path):
    files = files_of(sealed.path)
    files[-1].unlink()
    os.mkfifo(files[-1])  # since then
    with pytest.raises(RegistryError, match=r"evidence cannot be copied to .* is a named pipe"):
        kept.keep(version(tmp_path), sealed.path, files, [])
    assert not list((tmp_path / "kept").iterdir())
