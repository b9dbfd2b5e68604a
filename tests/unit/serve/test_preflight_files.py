"""The files of an adapter's directory: what is read, what is refused, and the copy that some are served from."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tuneship.core.errors import ArtifactError, PreflightError
from tuneship.core.files import sha256_file
from tuneship.serve import preflight
from tuneship.serve.preflight import files, folding


def settings_of(path: Path) -> dict:
    return json.loads((path / "adapter_config.json").read_text())


# Folding


REGEX = r"model\.layers\.\d+\.self_attn\.(?:q_proj|v_proj)"


def test_a_pattern_becomes_the_names_of_what_the_tensors_change(make_adapter, check):
    path = make_adapter("sql", config={"target_modules": REGEX})
    found = check(path)
    assert settings_of(found.path) == settings_of(path) | {"target_modules": ["q_proj", "v_proj"]}


def test_rslora_becomes_part_of_alpha(make_adapter, check):
    path = make_adapter("sql", rank=16, config={"use_rslora": True, "lora_alpha": 8})
    found = check(path)
    assert settings_of(found.path) == settings_of(path) | {"use_rslora": False, "lora_alpha": 32.0}


def test_the_copy_is_two_files_and_the_tensors_are_the_same_bytes(make_adapter, check):
    path = make_adapter("sql", config={"use_rslora": True})
    (path / "optimizer.pt").write_bytes(b"pickled")
    before = {file: file.read_bytes() for file in path.iterdir()}
    found = check(path)
    assert sorted(file.name for file in found.path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    weights = "adapter_model.safetensors"
    assert (found.path / weights).read_bytes() == (path / weights).read_bytes()
    assert {file: file.read_bytes() for file in path.iterdir()} == before, "the user's files were touched"


def test_the_copy_is_made_once_and_again_when_it_is_damaged(make_adapter, check):
    path = make_adapter("sql", config={"use_rslora": True})
    first = check(path)
    inode = first.path.stat().st_ino
    assert check(path) == first
    assert first.path.stat().st_ino == inode, "it was made again"
    (first.path / "adapter_model.safetensors").write_bytes(b"cut short")
    assert check(path) == first
    assert sha256_file(first.path / "adapter_model.safetensors") == sha256_file(path / "adapter_model.safetensors")
    assert [file.name for file in first.path.parent.iterdir()] == [first.path.name], "something was left behind"


def test_a_copy_that_is_interrupted_leaves_nothing(make_adapter, check, monkeypatch: pytest.MonkeyPatch):
    def interrupt(_folder: Path) -> None:
        raise KeyboardInterrupt

    path = make_adapter("sql", config={"use_rslora": True})
    monkeypatch.setattr(folding, "sync_tree", interrupt)
    with pytest.raises(KeyboardInterrupt):
        check(path)
    assert list((Path(os.environ["TUNESHIP_CACHE"]) / "adapters").iterdir()) == []


def test_a_copy_that_nobody_used_for_a_month_goes_when_another_is_made(make_adapter, check):
    old, used, new = (make_adapter(name, config={"use_rslora": True, "revision": name}) for name in ("a", "b", "c"))
    copies = {path: check(path).path for path in (old, used)}
    killed = copies[old].with_name(".draft-of-somebody")
    killed.mkdir()
    for path in (*copies.values(), killed):
        _age(path, days=31)
    check(used)
    assert copies[old].is_dir(), "nothing was made"
    copies[new] = check(new).path
    assert set(copies[old].parent.iterdir()) == {copies[used], copies[new]}
    _age(copies[used], days=29)
    copies[old] = check(old).path
    assert set(copies[old].parent.iterdir()) == set(copies.values())


def _age(path: Path, days: float) -> None:
    at = time.time() - days * 24 * 3600
    os.utime(path, (at, at))


def test_folding_changes_no_version(make_adapter, check):
    """A version is of the two files that answer: another alpha is another version, a trainer's leftovers are not."""
    path = make_adapter("sql", config={"use_rslora": True})
    version = check(path).content_id
    (path / "trainer_state.json").write_text("{}")
    assert check(path).content_id == version
    (path / "adapter_config.json").write_text(json.dumps(settings_of(path) | {"lora_alpha": 9}))
    assert check(path).content_id != version


# Files


def test_what_trainers_leave_beside_an_adapter_is_harmless(make_adapter, check):
    path = make_adapter("checkpoint-400")
    for name in (
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "training_args.bin",
        "trainer_state.json",
        "README.md",
    ):
        (path / name).write_bytes(b"x")
    (path / "checkpoint-200").mkdir()
    assert check(path).path == path.resolve()


@pytest.mark.parametrize(
    "name", ["adapter_model.bin", "adapter_model.pt", "pytorch_model.bin", "adapter.pth", "w.ckpt", "w.pkl"]
)
def test_pickled_weights(make_adapter, refusal, name: str):
    path = make_adapter("sql")
    (path / "adapter_model.safetensors").rename(path / name)
    (path / "optimizer.pt").write_bytes(b"x")
    error = refusal(path)
    assert f"has its weights pickled, in {name}: " in error.message
    assert "save_pretrained" in error.hint


def test_weights_that_are_missing(make_adapter, check):
    path = make_adapter("sql")
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"has no adapter_model\.safetensors"):
        check(path)


def test_settings_that_are_missing(make_adapter, check):
    path = make_adapter("sql")
    (path / "adapter_config.json").unlink()
    with pytest.raises(ArtifactError, match=r"has no adapter_config\.json"):
        check(path)


def test_a_path_that_is_no_directory_is_told_what_an_adapter_is(make_adapter, check, tmp_path):
    weights = make_adapter("sql") / "adapter_model.safetensors"
    for path, says in ((tmp_path / "nosuch", "there is no "), (weights, "is a file")):
        with pytest.raises(ArtifactError, match=says) as caught:
            check(path)
        assert "a directory with adapter_config.json and adapter_model.safetensors" in caught.value.hint
        assert "runs/NAME" in caught.value.hint


def test_the_folder_around_an_adapter(make_adapter, check):
    path = make_adapter("sql")
    with pytest.raises(ArtifactError, match=r"has no adapter_config\.json") as caught:
        check(path.parent)
    assert caught.value.hint == f"the adapter in it is {path}: name that"


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_model-00002-of-00002.safetensors"])
def test_weights_that_sglang_would_load_too(make_adapter, refusal, name: str):
    path = make_adapter("sql")
    (path / name).write_bytes((path / "adapter_model.safetensors").read_bytes())
    assert name in refusal(path).message


def test_an_index_that_leads_elsewhere(make_adapter, refusal):
    path = make_adapter("sql")
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../../other.safetensors"}}')
    error = refusal(path)
    assert "tells SGLang to load other files" in error.message
    assert "remove model.safetensors.index.json" in error.hint


BROKEN = {
    "cut short": lambda data: data[:-10],
    "a header that is cut": lambda data: data[:40],
    "no header": lambda _data: b"",
    "a header longer than the file": lambda data: struct.pack("<Q", 1 << 40) + data[8:],
    "offsets beyond the data": lambda data: data.replace(b'"data_offsets":[0,', b'"data_offsets":[8,', 1),
    "another dtype than the data": lambda data: data.replace(b'"F32"', b'"F64"', 1),
    "a pickle": lambda _data: b"\x80\x04K\x01." * 10,
}


@pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN.keys())
def test_files_that_are_no_safetensors(make_adapter, check, damage):
    path = make_adapter("sql")
    file = path / "adapter_model.safetensors"
    before = file.read_bytes()
    file.write_bytes(damage(before))
    assert file.read_bytes() != before
    with pytest.raises(ArtifactError, match=r"adapter_model.safetensors cannot be read .*: truncated, or not"):
        check(path)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_to_the_header_is_more_than_an_error(make_adapter, check, data: st.DataObject):
    path = make_adapter("sql")
    file = path / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    length = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, length - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    with contextlib.suppress(ArtifactError, PreflightError):
        check(path)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "tokenizer_config.json"])
def test_links_that_leave_the_directory(make_adapter, refusal, tmp_path: Path, name: str):
    path = make_adapter("sql")
    (tmp_path / "secret").write_text("{}")
    (path / name).unlink(missing_ok=True)
    (path / name).symlink_to(tmp_path / "secret")
    assert f"{name} is a link that leaves its directory" in refusal(path).message


def test_links_within_it(make_adapter, check):
    path = make_adapter("sql")
    (path / "real").mkdir()
    (path / "adapter_model.safetensors").rename(path / "real" / "w")
    (path / "adapter_model.safetensors").symlink_to("real/w")
    assert check(path).path == path.resolve()


@pytest.mark.parametrize("inside", ["", "epoch-3"])
def test_a_snapshot_of_the_hub_cache(make_adapter, check, refusal, tmp_path: Path, inside: str):
    """Its files are links to ../../blobs; to another repository's blobs they may not lead."""
    made, repository = make_adapter("made"), tmp_path / "hub" / "models--org--sql"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0123abc" / inside
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(made.iterdir())):
        file.rename(repository / "blobs" / f"{number:064x}")
        (snapshot / file.name).symlink_to(os.path.relpath(repository / "blobs" / f"{number:064x}", snapshot))
    (tmp_path / "adapters" / "sql").symlink_to(snapshot)
    assert check(tmp_path / "adapters" / "sql").name == "sql"

    (repository / "blobs").rename(tmp_path / "hub" / "blobs")
    for file in snapshot.iterdir():
        blob = tmp_path / "hub" / "blobs" / file.readlink().name
        file.unlink()
        file.symlink_to(blob)
    assert "leaves its directory" in refusal(snapshot).message


def test_what_is_no_file(make_adapter, check):
    path = make_adapter("sql")
    (path / "adapter_config.json").unlink()
    os.mkfifo(path / "adapter_config.json")
    with pytest.raises(ArtifactError, match="is not a file"):
        check(path)


@pytest.mark.parametrize("name", files.TOKENIZER + files.TEMPLATE)
def test_what_is_too_large_to_be_a_tokenizers(make_adapter, check, name: str):
    path = make_adapter("sql")
    with (path / name).open("wb") as sparse:
        sparse.truncate(1 << 40)  # takes no room; read whole, it would end the process
    with pytest.raises(ArtifactError, match=rf"{name} has {1 << 40} bytes, and at most \d+ are read") as caught:
        check(path)
    assert "save the tokenizer again" in caught.value.hint


def spoil(file: Path) -> None:
    """A value becomes NaN."""
    file.write_bytes(file.read_bytes()[:-4] + b"\xff\xff\xff\xff")


def no_header(file: Path) -> None:
    file.write_bytes(b"\xff" * file.stat().st_size)


def other_shapes(file: Path) -> None:
    """The same bytes as more and smaller matrices: nothing fits, and the size is the same."""
    content = file.read_bytes()
    file.write_bytes(content.replace(b"[4,8]", b"[8,4]"))
    assert file.read_bytes() != content


CHANGES = {
    spoil: "adapter_model.safetensors was changed after it was written",
    no_header: "adapter_model.safetensors was changed after it was written",
    other_shapes: "adapter_model.safetensors was changed after it was written",
    lambda file: file.write_bytes(file.read_bytes()[:-4]): "truncated or replaced",
    Path.unlink: "adapter_model.safetensors is missing",
    lambda file: [file.unlink(), os.mkfifo(file)]: "adapter_model.safetensors is missing",
}


@pytest.mark.parametrize(("change", "said"), CHANGES.items())
def test_that_an_artifact_was_changed_is_said_before_what_is_wrong_in_it(seal_adapter, check, change, said):
    path = seal_adapter("sql").path
    change(path / "adapter_model.safetensors")
    with pytest.raises(ArtifactError, match=said):
        check(path)


def test_settings_that_cannot_be_read_are_said_before_tensors(make_adapter, check):
    path = make_adapter("sql", config={"r": "four"})
    no_header(path / "adapter_model.safetensors")
    with pytest.raises(ArtifactError, match=r"adapter_config\.json is not an adapter's configuration: r"):
        check(path)


def test_a_pickled_adapter_is_seen_to_be_one(make_adapter):
    path = make_adapter("sql")
    (path / "adapter_config.json").unlink()
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    assert preflight.is_adapter(path)
