"""Artifacts: whole or not there, every change noticed by name, evidence beside the identity."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tuneship.core import artifact as artifacts
from tuneship.core.artifact import MANIFEST, Artifact, Manifest, draft, open_artifact, seal
from tuneship.core.errors import ArtifactError


def drafts(folder: Path) -> list[Path]:
    return list(folder.glob(".draft-*"))


def test_what_was_sealed_opens_the_same(sealed: Artifact, manifest: Manifest):
    opened = open_artifact(sealed.path, kind="adapter")
    assert opened == sealed
    assert sealed.path.name == f"adapter-{sealed.id12}"
    assert sealed.version == f"sql@{sealed.id12}"
    assert set(sealed.manifest.files) == {"adapter_config.json", "adapter_model.safetensors", "extra/notes.txt"}
    assert opened.manifest.base == manifest.base
    assert drafts(sealed.path.parent) == []


def test_it_opens_through_a_link_and_from_inside(sealed: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "latest").symlink_to(sealed.path)
    assert open_artifact(tmp_path / "latest").id12 == sealed.id12
    monkeypatch.chdir(sealed.path)
    assert open_artifact(Path()).path == sealed.path


def test_its_files_are_readable_by_others(sealed: Artifact):
    modes = {path.stat().st_mode & 0o777 for path in sealed.path.rglob("*") if path.is_file()}
    assert modes == {0o644}
    assert sealed.path.stat().st_mode & 0o777 == 0o755


def change_a_byte(path: Path) -> None:
    file = path / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[5000] ^= 1
    file.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path / "adapter_model.safetensors", 100)


def newer_schema(path: Path) -> None:
    content = json.loads((path / MANIFEST).read_text())
    content["schema"] = 99
    content["kind"] = "something-of-the-future"
    (path / MANIFEST).write_text(json.dumps(content))


def another_id(path: Path) -> None:
    content = json.loads((path / MANIFEST).read_text())
    content["files"]["adapter_config.json"]["sha256"] = "0" * 64
    content["files"].pop("adapter_config.json")
    (path / "adapter_config.json").unlink()
    (path / MANIFEST).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (change_a_byte, "adapter_model.safetensors was changed after it was written"),
        (truncate, "adapter_model.safetensors has 100 bytes, not 10240"),
        (lambda path: (path / "extra" / "notes.txt").unlink(), "extra/notes.txt is missing"),
        (lambda path: (path / "surprise.bin").touch(), "surprise.bin does not belong to it"),
        (lambda path: (path / MANIFEST).unlink(), "is not an artifact"),
        (lambda path: (path / MANIFEST).write_text('{"schema": 1'), "cannot be read"),
        (lambda path: (path / MANIFEST).write_text("{}"), "cannot be read"),
        (lambda path: os.truncate(path / MANIFEST, artifacts.LARGEST_MANIFEST + 1), "at most 16777216 bytes"),
        (lambda path: (path / MANIFEST).write_text("[" * 100_000), "not a JSON object"),
        (newer_schema, "schema 99; this tuneship reads up to 1"),
        (another_id, "does not fit its content id"),
    ],
)
def test_a_change_is_refused_by_name(sealed: Artifact, damage: Callable[[Path], object], says: str):
    damage(sealed.path)
    with pytest.raises(ArtifactError) as caught:
        open_artifact(sealed.path)
    assert says in caught.value.message
    assert str(sealed.path) in caught.value.message


@pytest.mark.parametrize(
    ("damage", "damaged"),
    [
        (lambda _: None, False),
        (lambda path: (path / "surprise.bin").touch(), False),
        (change_a_byte, True),
        (truncate, True),
        (lambda path: (path / "extra" / "notes.txt").unlink(), True),
        (lambda path: (path / MANIFEST).unlink(), True),
        (lambda path: os.truncate(path / MANIFEST, 200), True),
        (lambda path: (path / MANIFEST).write_text("{}"), True),
        (lambda path: (path / MANIFEST).write_text("[]"), True),
        (lambda path: (path / MANIFEST).write_text("[" * 100_000), True),
        (lambda path: os.truncate(path / MANIFEST, 1 << 40), True),
        (another_id, True),
    ],
)
def test_what_making_it_again_would_mend(sealed: Artifact, damage: Callable[[Path], object], damaged: bool):
    damage(sealed.path)
    assert artifacts.is_damaged(sealed.path) is damaged


def test_a_newer_one_is_not_damaged_whatever_else_is_wrong_with_it(sealed: Artifact):
    newer_schema(sealed.path)
    change_a_byte(sealed.path)
    with pytest.raises(ArtifactError, match="schema 99"):
        artifacts.is_damaged(sealed.path)


@pytest.mark.parametrize("damage", [change_a_byte, lambda path: os.truncate(path / MANIFEST, 200)])
def test_the_hint_of_a_damaged_one_is_the_command_that_makes_it(sealed: Artifact, damage: Callable[[Path], object]):
    damage(sealed.path)
    with pytest.raises(ArtifactError) as caught:
        open_artifact(sealed.path)
    assert caught.value.hint.startswith("`tuneship train RECIPE` makes it again")


@pytest.mark.parametrize(
    ("kind", "model", "revision", "double", "options"),
    [
        ("base-nf4", "org/base", "0f1e2d", True, "org/base --revision 0f1e2d"),
        ("base-nf4", "/models/my base", "", False, "'/models/my base' --no-double"),
        ("base-nf4", "bundled:small", "0.1.2", True, "bundled:small"),
        ("base-dequantized", "org/base", "0f1e2d", False,
         "org/base --quantization dequantized --revision 0f1e2d --no-double"),
    ],
)  # fmt: skip
def test_the_hint_of_a_base_makes_that_base_and_no_other(
    tmp_path: Path, manifest: Manifest, kind: str, model: str, revision: str, double: bool, options: str
):
    base = manifest.base.model_copy(update={"id": model, "revision": revision})
    quantization = manifest.quantization.model_copy(update={"double": double})
    changes = {"kind": kind, "base": base, "quantization": quantization}
    built = seal_in(tmp_path, manifest.model_copy(update=changes), "payload")
    (built.path / "weights.bin").unlink()
    with pytest.raises(ArtifactError) as caught:
        open_artifact(built.path)
    assert caught.value.hint.startswith(f"`tuneship base build {options} --out {tmp_path}` makes it again")
    os.truncate(built.path / MANIFEST, 200)  # what it was built with is gone, too
    with pytest.raises(ArtifactError) as caught:
        open_artifact(built.path)
    assert "with the options that it was built with, makes it again" in caught.value.hint


def test_a_renamed_artifact_is_refused(sealed: Artifact):
    moved = sealed.path.rename(sealed.path.with_name("adapter-000000000000"))
    with pytest.raises(ArtifactError, match="does not fit its content id"):
        open_artifact(moved)


def test_another_kind_is_refused(sealed: Artifact):
    with pytest.raises(ArtifactError, match="of kind 'adapter', not 'merged'"):
        open_artifact(sealed.path, kind="merged")


def test_another_base_is_refused(sealed: Artifact):
    artifacts.check_base(sealed, "a" * 64, "org/base")
    with pytest.raises(ArtifactError, match=r"was trained on org/base .* not on org/other") as caught:
        artifacts.check_base(sealed, "f" * 64, "org/other")
    assert "org/base" in caught.value.hint


@pytest.mark.parametrize("name", ["adapter-000000000000", "sql"])
def test_a_manifest_without_end_is_refused_and_not_read(sealed: Artifact, name: str):
    path = sealed.path.rename(sealed.path.with_name(name))
    os.truncate(path / MANIFEST, 1 << 40)  # takes no room; read whole, it would end the process
    with pytest.raises(ArtifactError, match="at most 16777216 bytes") as caught:
        open_artifact(path)
    assert f"restore {name} from a copy" in caught.value.hint


def test_the_largest_manifest_is_read(sealed: Artifact):
    text = (sealed.path / MANIFEST).read_text()
    (sealed.path / MANIFEST).write_text(text.ljust(artifacts.LARGEST_MANIFEST))
    assert open_artifact(sealed.path) == sealed


FORGED = "m\nerror: all is well\x1b[2J\u202e" + "x" * 1_000_000


def forge(sealed: Artifact, **about: object) -> Artifact:
    """The same with another manifest."""
    content = json.loads((sealed.path / MANIFEST).read_text()) | about
    (sealed.path / MANIFEST).write_text(json.dumps(content))
    return sealed


def forged_names(sealed: Artifact) -> object:
    return open_artifact(forge(sealed, files={FORGED: {"size": 1, "sha256": ""}}).path)


def forged_entry(sealed: Artifact) -> object:
    return open_artifact(forge(sealed, files={FORGED: {"size": "one"}}).path)


def a_stray_file(sealed: Artifact) -> object:
    (sealed.path / FORGED[:100]).touch()
    return open_artifact(sealed.path)


def forged_base(sealed: Artifact) -> None:
    base = {"id": FORGED, "revision": FORGED, "weights_sha256": FORGED, "architecture": FORGED}
    opened = open_artifact(forge(sealed, base=base).path)
    artifacts.check_base(opened, "f" * 64, FORGED)


def a_damaged_forged_base(sealed: Artifact) -> object:
    base = {"id": FORGED, "revision": FORGED, "weights_sha256": "", "architecture": ""}
    forge(sealed, kind="base-nf4", base=base)
    change_a_byte(sealed.path)
    return open_artifact(sealed.path)


@pytest.mark.parametrize("read", [forged_names, forged_entry, a_stray_file, forged_base, a_damaged_forged_base])
def test_what_a_manifest_says_is_repeated_on_one_line(sealed: Artifact, read: Callable[[Artifact], object]):
    with pytest.raises(ArtifactError) as caught:
        read(sealed)
    for text in (caught.value.message, caught.value.hint):
        assert text.isprintable()
        assert len(text) < 10_000
    assert "\\x1b[2J" in caught.value.message + caught.value.hint


def test_evidence_is_appended_and_does_not_change_the_id(sealed: Artifact):
    first = artifacts.add_evidence(sealed, "parity", '{"n": 1}')
    artifacts.add_evidence(sealed, "parity", '{"n": 2}')
    first.unlink()
    third = artifacts.add_evidence(sealed, "parity", '{"n": 3}')
    assert [path.name for path in sorted(sealed.evidence.iterdir())] == ["parity-2.json", "parity-3.json"]
    assert third.read_text() == '{"n": 3}'
    assert open_artifact(sealed.path).manifest.content_id == sealed.manifest.content_id


def test_the_id_is_over_the_payload_alone(tmp_path: Path, manifest: Manifest):
    ids = {
        seal_in(tmp_path / f"run{number}", new, "payload").id12
        for number, new in enumerate([manifest, manifest.model_copy(update={"input_id": "9" * 64})])
    }
    assert len(ids) == 1
    assert seal_in(tmp_path / "other", manifest, "another").id12 not in ids


def seal_in(folder: Path, manifest: Manifest, payload: str, evidence: str = "") -> Artifact:
    with draft(folder) as work:
        (work / "weights.bin").write_text(payload)
        if evidence:
            (work / "evidence").mkdir()
            (work / "evidence" / "parity-1.json").write_text(evidence)
        return seal(work, manifest)


def test_the_same_payload_again_keeps_the_artifact_and_adds_the_evidence(tmp_path: Path, manifest: Manifest):
    first = seal_in(tmp_path, manifest, "payload", "old")
    again = seal_in(tmp_path, manifest, "payload", "new")
    assert again == first
    assert [(again.evidence / f"parity-{n}.json").read_text() for n in (1, 2)] == ["old", "new"]
    assert drafts(tmp_path) == []


def test_a_damaged_artifact_is_replaced_by_the_same_payload(tmp_path: Path, manifest: Manifest):
    first = seal_in(tmp_path, manifest, "payload")
    (first.path / "weights.bin").write_text("garbage")
    seal_in(tmp_path, manifest, "payload")
    assert (open_artifact(first.path).path / "weights.bin").read_text() == "payload"
    assert [path.name for path in tmp_path.iterdir()] == [first.path.name]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_in_mid_draft_leaves_nothing(tmp_path: Path, error: type[BaseException]):
    def fail() -> None:
        with draft(tmp_path) as work:
            (work / "half.bin").write_bytes(b"half")
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_sigkill_in_mid_draft_leaves_no_artifact(tmp_path: Path):
    code = (
        "import sys, time; from pathlib import Path; from tuneship.core.artifact import draft\n"
        "with draft(Path(sys.argv[1])) as work:\n"
        "    (work / 'artifact.json').write_text('{}'); print('half', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"half\n"
        child.send_signal(signal.SIGKILL)
    assert list(tmp_path.glob("adapter-*")) == []
    assert len(drafts(tmp_path)) == 1  # `rundir.locked` removes it


def test_a_full_disk_leaves_nothing(small_disk: Path, manifest: Manifest):
    def fill() -> None:
        with draft(small_disk / "artifacts") as work:
            (work / "weights.bin").write_bytes(bytes(900_000))
            (work / "more.bin").write_bytes(bytes(900_000))
            seal(work, manifest)

    with pytest.raises(OSError, match="No space left on device"):
        fill()
    assert list((small_disk / "artifacts").iterdir()) == []
    seal_in(small_disk / "artifacts", manifest, "small enough")


def test_a_disk_that_fills_up_while_sealing_leaves_nothing(small_disk: Path, manifest: Manifest):
    room = os.statvfs(small_disk)
    payload = "x" * (room.f_bavail * room.f_bsize - 3 * room.f_bsize)
    big = manifest.model_copy(update={"metrics": {f"metric {n}": 0.1 for n in range(2000)}})
    with pytest.raises(OSError, match="No space left on device"):
        seal_in(small_disk, big, payload)
    assert list(small_disk.iterdir()) == []
