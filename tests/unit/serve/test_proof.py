"""What fits may be loaded, what is sound asked, what is proven answers: together they say what the whole check says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tuneship.core import artifact
from tuneship.core.errors import ArtifactError, PreflightError, TuneshipError
from tuneship.serve import preflight
from tuneship.serve.preflight import CheckedAdapter
from tuneship.serve.preflight.files import CONFIG, WEIGHTS

from .conftest import manifest, write_adapter

FILES = (CONFIG, WEIGHTS)


@pytest.fixture
def seal(tmp_path: Path, base: Path):
    """Factory (options of `write_adapter`) -> a sealed adapter with a file that no server reads."""

    def make(**options) -> artifact.Artifact:
        with artifact.draft(tmp_path / "artifacts") as work:
            write_adapter(work, **options)
            (work / "README.md").write_text("of the adapter")
            return artifact.seal(work, manifest("sql", base, None, "adapter"))

    return make


@pytest.fixture
def copied(tmp_path: Path):
    """(checked) -> a copy of the two files, as the store makes it."""

    def make(checked: CheckedAdapter) -> Path:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        for name in FILES:
            shutil.copy(checked.path / name, copy)
        return copy

    return make


def not_a_number(tensors: dict[str, np.ndarray]) -> None:
    next(iter(tensors.values()))[0, 0] = np.nan


def silence(tensors: dict[str, np.ndarray]) -> None:
    for key, values in tensors.items():
        if "lora_B" in key:
            values[:] = 0


def widen(tensors: dict[str, np.ndarray]) -> None:
    key = next(iter(tensors))
    tensors[key] = np.ones((4, 9), np.float32)


def refused(function, *given) -> tuple[type, str, str]:
    with pytest.raises(TuneshipError) as caught:
        function(*given)
    return type(caught.value), caught.value.message, caught.value.hint


@pytest.mark.parametrize("origin", ["plain", "sealed", "folded", "ranks", "pattern"])
def test_what_fits_and_is_proven_is_what_was_checked(facts, seal, make_adapter, copied, origin):
    config = {
        "folded": {"use_rslora": True},
        "ranks": {"rank_pattern": {"v_proj": 4}, "alpha_pattern": {"v_proj": 32}},
        "pattern": {"target_modules": r".*\.[qv]_proj"},
    }.get(origin)
    path = seal().path if origin == "sealed" else make_adapter("sql", config=config)
    checked = preflight.fits(path, facts)
    assert checked == preflight.check(path, facts)
    assert (checked.path == path.resolve()) == (origin in {"plain", "sealed"})
    assert preflight.sound(checked, copied(checked), facts) == ()
    preflight.prove(checked, copied(checked))


@pytest.mark.parametrize("sealed", [True, False])
def test_values_are_looked_at_in_the_copy_and_refused_in_the_same_words(facts, seal, make_adapter, copied, sealed):
    path = seal(change=not_a_number).path if sealed else make_adapter("sql", change=not_a_number)
    checked = preflight.fits(path, facts)
    said = refused(preflight.sound, checked, copied(checked), facts)
    assert said == refused(preflight.check, path, facts)
    assert "has NaN or infinity" in said[1]


def test_a_folded_one_is_checked_in_full_before_it_is_folded(facts, make_adapter):
    path = make_adapter("sql", config={"use_rslora": True}, change=not_a_number)
    assert "has NaN or infinity" in refused(preflight.fits, path, facts)[1]


def test_all_that_is_wrong_is_said_at_once(facts, make_adapter):
    def both(tensors: dict[str, np.ndarray]) -> None:
        widen(tensors)
        list(tensors.values())[-1][0, 0] = np.inf

    path = make_adapter("sql", change=both)
    said = refused(preflight.fits, path, facts)
    assert said == refused(preflight.check, path, facts)
    assert "for 2 reasons" in said[1]


@pytest.mark.parametrize("file", [*FILES, "README.md"])
@pytest.mark.parametrize("damage", ["a byte", "cut", "gone", "more"])
def test_a_damaged_artifact_is_refused_in_the_words_of_the_check(facts, seal, copied, file, damage):
    sealed = seal()
    broken = sealed.path / file
    content = broken.read_bytes()
    broken.unlink()
    if damage != "gone":
        end = {"a byte": bytes([content[-1] ^ 1]), "cut": b"", "more": content[-1:] + b"x"}[damage]
        broken.write_bytes(content[:-1] + end)
    wanted = refused(preflight.check, sealed.path, facts)
    assert wanted[0] is ArtifactError

    def load() -> None:
        checked = preflight.fits(sealed.path, facts)
        copy = copied(checked)
        preflight.sound(checked, copy, facts)
        preflight.prove(checked, copy)

    assert refused(load) == wanted
    if file == "README.md" or (file, damage) == (WEIGHTS, "a byte"):
        preflight.fits(sealed.path, facts)  # no engine would notice


def test_a_stranger_in_an_artifact(facts, seal, copied):
    sealed = seal()
    (sealed.path / "more.txt").touch()
    checked = preflight.fits(sealed.path, facts)
    assert refused(preflight.prove, checked, copied(checked)) == refused(preflight.check, sealed.path, facts)


def test_a_manifest_that_names_another_adapter_is_not_believed(facts, seal):
    sealed, other = seal(), seal(config={"revision": "other"})
    file = sealed.path / artifact.MANIFEST
    file.write_text(file.read_text().replace(sealed.manifest.content_id, other.manifest.content_id))
    assert refused(preflight.fits, sealed.path, facts) == refused(preflight.check, sealed.path, facts)


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("change", ["a byte", "cut", "gone"])
def test_a_copy_of_something_else_is_none(facts, seal, make_adapter, copied, sealed, file, change):
    checked = preflight.fits(seal().path if sealed else make_adapter("sql"), facts)
    copy = copied(checked)
    content = (copy / file).read_bytes()
    (copy / file).unlink()
    if change != "gone":
        (copy / file).write_bytes(content[:-1] + (b"" if change == "cut" else bytes([content[-1] ^ 1])))
    kind, said, _ = refused(preflight.prove, checked, copy)
    assert kind is ArtifactError
    assert "was changed while it was being loaded" in said
    if change != "a byte":
        assert refused(preflight.sound, checked, copy, facts)[:2] == (kind, said)


def test_an_artifact_that_was_replaced_by_another_one_is_noticed(facts, seal, copied):
    sealed, other = seal(), seal(config={"revision": "other"})
    checked = preflight.fits(sealed.path, facts)
    copy = copied(checked)
    shutil.rmtree(sealed.path)
    shutil.copytree(other.path, sealed.path)
    assert "was changed while it was being loaded" in refused(preflight.prove, checked, copy)[1]
    assert refused(preflight.prove, checked, copied(checked))[0] is ArtifactError


def test_what_was_sealed_with_other_shapes_is_refused_whatever_lay_there_when_it_was_checked(facts, seal):
    """Its bytes are those of its manifest, and would end an engine at the first question."""
    wide = seal(change=widen)
    checked = CheckedAdapter("sql", wide.manifest.content_id, wide.path)
    kind, said, _ = refused(preflight.sound, checked, wide.path, facts)
    assert kind is PreflightError
    assert "does not fit" in said
    odd = seal(config={"use_dora": True})
    checked = CheckedAdapter("sql", odd.manifest.content_id, odd.path)
    assert "use_dora" in refused(preflight.sound, checked, odd.path, facts)[1]
    broad = seal(rank=5)
    checked = CheckedAdapter("sql", broad.manifest.content_id, broad.path)
    assert "has rank 5" in refused(preflight.sound, checked, broad.path, facts, preflight.Limits(max_rank=4))[1]


@pytest.mark.parametrize("sealed", [True, False])
def test_values_that_damage_made_are_said_to_be_damage(facts, seal, make_adapter, copied, sealed):
    checked = preflight.fits(seal().path if sealed else make_adapter("sql"), facts)
    if sealed:
        broken = checked.path / WEIGHTS
        broken.write_bytes(broken.read_bytes()[:-4] + b"\xff" * 4)
        assert "was changed after it was written" in refused(preflight.sound, checked, copied(checked), facts)[1]
    else:
        copy = copied(checked)
        (copy / WEIGHTS).write_bytes((copy / WEIGHTS).read_bytes()[:-4] + b"\xff" * 4)
        assert "was changed while it was being loaded" in refused(preflight.sound, checked, copy, facts)[1]


def test_what_changes_nothing_is_remarked_when_its_values_were_seen(facts, make_adapter, copied):
    path = make_adapter("sql", change=silence)
    checked = preflight.fits(path, facts)
    assert checked.remarks == ()
    assert preflight.sound(checked, copied(checked), facts) == preflight.check(path, facts).remarks != ()


def test_the_name_of_a_plain_one_is_made_of_what_was_read(facts, make_adapter):
    path = make_adapter("sql")
    before = preflight.fits(path, facts)
    settings = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps(settings | {"revision": "next"}))
    assert preflight.fits(path, facts).content_id != before.content_id
