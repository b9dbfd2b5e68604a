"""Copies of adapters: exactly what was checked, whole or not at all, gone when nobody needs them."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.unit.serve.conftest import unreadable
from tuneship.core.errors import ArtifactError, RegistryError
from tuneship.serve import store as stores
from tuneship.serve.preflight import CheckedAdapter
from tuneship.serve.registry import Registry
from tuneship.serve.registry.records import COPIES
from tuneship.serve.store import AdapterStore

FILES = ["adapter_config.json", "adapter_model.safetensors"]
COPIER = """
import sys
from pathlib import Path
from tuneship.serve.preflight import CheckedAdapter
from tuneship.serve.store import AdapterStore

store = AdapterStore(Path(sys.argv[1]))
checked = CheckedAdapter("sql", sys.argv[3], Path(sys.argv[2]))
while True:
    print(store.copy(checked), flush=True)
"""


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "state" / "adapters")


@pytest.fixture(params=["plain", "sealed", "folded"])
def checked(request: pytest.FixtureRequest, make_adapter, seal_adapter, check) -> CheckedAdapter:
    """An adapter of each origin: a PEFT directory, an artifact of ours, one that SGLang needs in other words."""
    if request.param == "sealed":
        return check(seal_adapter("sql").path)
    return check(make_adapter("sql", config={"use_rslora": request.param == "folded"}))


def listed(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_a_copy_holds_what_sglang_reads_and_nothing_else(store, checked):
    (checked.path / "added_tokens.json").write_text("{}")  # SGLang would read it
    kept = store.keep(checked)
    assert kept.name == f"{checked.content_id[:12]}-1"
    assert listed(kept) == FILES
    assert all((kept / name).read_bytes() == (checked.path / name).read_bytes() for name in FILES)
    assert not any(path.is_symlink() for path in kept.iterdir())
    assert kept.stat().st_mode & 0o777 == 0o755


def test_each_load_has_a_directory_of_its_own(store, checked):
    kept = [store.keep(checked) for _ in range(3)]
    assert [path.name.rpartition("-")[2] for path in kept] == ["1", "2", "3"]
    store.drop(kept[1])
    assert listed(kept[0].parent) == [kept[0].name, kept[2].name]
    store.drop(kept[1])  # gone already
    assert store.keep(checked).name.endswith("-4")  # an engine may still know the path of the second
    assert AdapterStore(kept[0].parent).keep(checked).name.endswith("-2")  # another engine knows nothing


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("change", ["a byte", "cut", "gone"])
def test_bytes_that_changed_since_the_check_are_noticed(store, checked, file, change):
    changed = checked.path / file
    content = changed.read_bytes()
    changed.unlink()
    if change != "gone":
        changed.write_bytes(content[:-1] + (b"" if change == "cut" else bytes([content[-1] ^ 1])))
    with pytest.raises(ArtifactError, match="was changed while it was being loaded"):
        store.keep(checked)
    assert store.sweep(set()) == []  # and nothing is left of it


def test_an_artifact_that_was_replaced_together_with_its_manifest_is_noticed(store, seal_adapter, check):
    sealed, other = seal_adapter("sql"), seal_adapter("other")
    checked = check(sealed.path)
    shutil.rmtree(checked.path)
    shutil.copytree(other.path, checked.path)
    with pytest.raises(ArtifactError, match="was changed"):
        store.keep(checked)
    manifest = checked.path / "artifact.json"
    manifest.write_text(manifest.read_text().replace(other.manifest.content_id, checked.content_id))
    with pytest.raises(ArtifactError, match="was changed"):
        store.keep(checked)


def test_bytes_that_change_while_they_are_copied_are_noticed(store, checked, monkeypatch):
    copy = shutil.copyfileobj

    def copy_and_change(source, target, *length) -> None:
        copy(source, target, *length)
        target.seek(0)
        target.write(b"{ ")

    monkeypatch.setattr(stores.shutil, "copyfileobj", copy_and_change)
    with pytest.raises(ArtifactError, match="was changed"):
        store.keep(checked)


@pytest.mark.parametrize("copied", [-1, 0, 7])
def test_what_the_kernel_does_not_copy_is_copied_all_the_same(store, checked, monkeypatch, copied):
    kernels = os.copy_file_range

    def stops_early(source: int, target: int, _: int) -> int:
        if copied < 0:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        if os.lseek(source, 0, os.SEEK_CUR) < copied:
            return kernels(source, target, copied)
        return 0

    monkeypatch.setattr(stores.os, "copy_file_range", stops_early)
    kept = store.keep(checked)
    assert all((kept / name).read_bytes() == (checked.path / name).read_bytes() for name in FILES)


@pytest.mark.parametrize("file", FILES)
def test_a_copy_that_an_engine_may_have_read_is_proven_afterwards(store, checked, file):
    kept = store.copy(checked)
    assert listed(kept) == FILES
    store.prove(checked, kept)
    with (kept / file).open("r+b") as copy:
        copy.seek(-1, os.SEEK_END)
        copy.write(b"~")
    with pytest.raises(ArtifactError, match="was changed"):
        store.prove(checked, kept)


def test_what_is_flushed_is_on_the_disk(store, checked, monkeypatch):
    flushed, kept = set(), store.copy(checked)
    monkeypatch.setattr(os, "fsync", lambda file: flushed.add(Path(f"/proc/self/fd/{file}").readlink()))
    store.flush(kept)
    assert flushed == {kept / FILES[0], kept / FILES[1], kept, kept.parent}


def test_what_was_begun_is_taken_once_it_was_checked(store, make_adapter, check):
    path = make_adapter("sql")
    begun = store.begin(path)
    assert begun
    assert begun.work.name.startswith(".")
    checked = check(path)
    (path / FILES[1]).unlink()  # it is not read again
    kept = store.copy(checked, begun)
    store.prove(checked, kept)
    store.forget(begun)
    assert listed(kept) == FILES
    assert kept.stat().st_mode & 0o777 == 0o755
    assert list(kept.parent.iterdir()) == [kept]


def test_what_was_begun_and_then_changed_is_not_served(store, make_adapter, check):
    path = make_adapter("sql")
    begun = store.begin(path)
    (path / FILES[0]).write_text(json.dumps(json.loads((path / FILES[0]).read_text()) | {"revision": "next"}))
    checked = check(path)
    with pytest.raises(ArtifactError, match="was changed"):
        store.prove(checked, store.copy(checked, begun))


def test_an_adapter_in_other_words_is_copied_when_those_are_there(store, make_adapter, check):
    path = make_adapter("sql", config={"use_rslora": True})
    begun = store.begin(path)
    checked = check(path)
    store.prove(checked, store.copy(checked, begun))
    store.forget(begun)
    assert not begun.work.exists()


@pytest.mark.parametrize("odd", ["gone", "a link", "a pipe", "large", "no room"])
def test_what_may_be_anything_is_not_copied_before_it_is_checked(store, make_adapter, monkeypatch, odd):
    path = make_adapter("sql")
    file = path / FILES[1]
    content = file.read_bytes()
    file.unlink()
    if odd == "a link":
        file.symlink_to("/etc/hostname")
    elif odd == "a pipe":
        os.mkfifo(file)
    elif odd == "large":
        with file.open("wb") as sparse:
            sparse.truncate((1 << 28) + 1)
    elif odd == "no room":
        file.write_bytes(content)
        monkeypatch.setattr(stores.shutil, "copyfileobj", lambda *_: os.write(-1, b""))
    assert store.begin(path) is None
    assert store.sweep(set()) == []


def test_two_threads_with_one_adapter_get_two_copies(store, make_adapter, check):
    checked, kept = check(make_adapter("sql")), []
    threads = [threading.Thread(target=lambda: kept.append(store.keep(checked))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(kept)) == 6
    assert all(listed(path) == FILES for path in kept)


def test_killed_while_it_copies_it_leaves_nothing_that_counts(tmp_path, make_adapter, check):
    folder = tmp_path / "store"
    checked = check(make_adapter("sql"))
    # What is copied matters no more than its size: enough that a kill meets the middle of it.
    (checked.path / "adapter_config.json").write_text(json.dumps({"pad": "x" * 4_000_000}))
    identity = stores.artifact.content_id(stores.artifact.hash_payload(checked.path))
    halves = 0
    for moment in range(4):
        argv = [sys.executable, "-c", COPIER, str(folder), str(checked.path), identity]
        copier = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        said = [Path(copier.stdout.readline().strip())]
        time.sleep(0.017 * moment)
        os.kill(copier.pid, signal.SIGKILL)
        said += [Path(line) for line in copier.communicate()[0].split()]
        whole = [path for path in folder.iterdir() if not path.name.startswith(".")]
        assert set(said) <= set(whole)
        for path in whole:
            assert all((path / name).read_bytes() == (checked.path / name).read_bytes() for name in FILES)
        halves += len(list(folder.glob(".*")))
        AdapterStore(folder).sweep({said[0]})
        assert list(folder.iterdir()) == [said[0]]
    assert halves  # else no kill met a copy that was half done


def test_sweep_removes_what_nobody_refers_to(store, make_adapter, check):
    assert store.sweep({Path("/somewhere/else")}) == []
    first, second = (store.keep(check(make_adapter(name))) for name in ("a", "b"))
    stray = second.parent / "a-file"
    half = second.parent / ".draft-x"
    stray.touch()
    half.mkdir()
    assert store.sweep({first}) == sorted([second, stray, half])
    assert listed(first.parent) == [first.name]
    assert listed(first) == FILES


def test_a_link_in_the_store_goes_and_not_what_it_leads_to(store, tmp_path, make_adapter, check):
    kept = store.keep(check(make_adapter("a")))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").touch()
    (kept.parent / "link").symlink_to(tmp_path / "theirs")
    store.sweep({kept})
    assert listed(tmp_path / "theirs") == ["file"]
    assert listed(kept.parent) == [kept.name]


def test_what_lies_elsewhere_is_never_dropped(store, tmp_path):
    store.drop(tmp_path)
    assert tmp_path.is_dir()


def test_a_copy_that_cannot_be_dropped_is_said_and_swept_later(store, checked, capsys):
    kept = store.keep(checked)
    in_the_way = kept.with_name(f".gone-{kept.name}")
    in_the_way.touch()
    store.drop(kept)
    assert (
        f"warning: {kept}, which nobody reads any more, cannot be removed: Not a directory" in capsys.readouterr().err
    )
    in_the_way.unlink()
    assert store.sweep(set()) == [kept]


def test_what_cannot_be_swept_is_an_error_that_says_so(store, checked):
    kept = store.keep(checked)
    in_the_way = kept.with_name(f".gone-{kept.name}")
    in_the_way.touch()
    with pytest.raises(RegistryError, match=f"cannot be removed from {kept.parent}: Not a directory") as caught:
        store.sweep({in_the_way})
    assert "may this user write there?" in caught.value.hint
    with unreadable(kept.parent), pytest.raises(RegistryError, match=f"from {kept.parent}: Permission denied"):
        store.sweep(set())
    assert store.sweep(set()) == sorted([kept, in_the_way])


def test_no_room_is_an_error_that_says_so(store, make_adapter, check, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    checked = check(make_adapter("sql"))
    with monkeypatch.context() as patch:
        patch.setattr(stores.shutil, "copyfileobj", full)
        with pytest.raises(RegistryError, match="No space left on device") as caught:
            store.keep(checked)
    assert "disk full" in caught.value.hint
    assert store.sweep(set()) == []


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_a_servers_folder_is_moved_or_copied_as_a_whole(tmp_path, make_adapter, check, how):
    here, there = tmp_path / "state", tmp_path / "elsewhere"
    store, checked = AdapterStore(here / COPIES), check(make_adapter("sql"))
    with Registry.open(here / "registry.sqlite", "b", "the-base") as registry:
        name = registry.add("sql", checked.content_id, store.keep(checked)).name
        registry.loaded(name, "passed")
        registry.promote(name)
    if how == "moved":
        here.rename(there)
    else:
        shutil.copytree(here, there)
    store = AdapterStore(there / COPIES)
    with Registry.open(there / "registry.sqlite", "b", "the-base") as registry:
        (version,) = registry.present()
        assert (registry.recovered, version.state) == ((), "live")
        assert store.sweep({version.path}) == []
        store.prove(checked, version.path)
        store.drop(version.path)
        assert listed(there / COPIES) == []
    assert how == "moved" or len(listed(here / COPIES)) == 1
