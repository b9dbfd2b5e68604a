"""What may be served, and what is refused by name before an engine starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuneship.core.errors import ArtifactError, PreflightError
from tuneship.core.rundir import RunDir
from tuneship.serve import catalog


def entry_of(found: catalog.Catalog, name: str) -> catalog.Entry:
    (entry,) = (entry for entry in found.entries if entry.name == name)
    return entry


def test_a_base_is_served_under_its_folders_name(base: Path):
    found = catalog.read(str(base))
    assert found.mode == "base"
    assert [(entry.name, entry.selector) for entry in found.entries] == [("base", None)]
    assert found.base.version.startswith("base@")


def test_a_merged_artifact_is_served_under_the_recipes_name(seal_adapter):
    merged = seal_adapter("invoice", kind="merged")
    found = catalog.read(str(merged.path))
    assert found.mode == "merged"
    assert found.base.name == "invoice"
    assert found.base.version == merged.version
    assert found.base.artifact_id == merged.manifest.content_id


def test_name_overrides(seal_adapter):
    assert catalog.read(str(seal_adapter("invoice", kind="merged").path), name="org/prod").base.name == "org/prod"


def test_adapters_become_names_with_versions(base: Path, make_adapter):
    make_adapter("sql")
    folder = make_adapter("triage").parent
    found = catalog.read(str(base), folder)
    assert found.mode == "adapters"
    assert [entry.name for entry in found.entries] == ["base", "sql", "triage"]
    sql = entry_of(found, "sql")
    assert sql is not None
    assert sql.selector == sql.version
    assert sql.version == f"sql@{sql.artifact_id[:12]}"


def test_the_directory_of_one_adapter_will_do(base: Path, make_adapter):
    assert entry_of(catalog.read(str(base), make_adapter("sql")), "sql")


def test_a_trainers_checkpoints_are_not_served_with_the_adapter_that_they_lie_in(base: Path, make_adapter):
    folder = make_adapter("sql")
    make_adapter("sql/checkpoint-400")
    assert [entry.name for entry in catalog.read(str(base), folder).entries] == ["base", "sql"]


def test_an_adapter_that_changes_nothing_is_served_with_a_warning(base: Path, make_adapter, capsys):
    def silence(tensors: dict) -> None:
        tensors.update({key: 0 * value for key, value in tensors.items() if "lora_B" in key})

    assert entry_of(catalog.read(str(base), make_adapter("sql", change=silence)), "sql")
    assert "warning: adapter 'sql' changes nothing" in capsys.readouterr().err


def test_a_copy_in_sglangs_words_is_served_under_the_adapters_name(base: Path, make_adapter, tmp_path: Path):
    plain, stable = make_adapter("plain"), make_adapter("stable", config={"use_rslora": True})
    found = catalog.read(str(base), plain.parent)
    assert [entry.name for entry in found.entries] == ["base", "plain", "stable"]
    assert found.entries[1].path == plain.resolve()
    assert not found.entries[2].path.is_relative_to(stable.parent)


def test_a_link_is_called_by_its_own_name(base: Path, make_adapter, tmp_path: Path):
    (tmp_path / "chosen").mkdir()
    (tmp_path / "chosen" / "sql").symlink_to(make_adapter("checkpoint-400"))
    entry = entry_of(catalog.read(str(base), tmp_path / "chosen"), "sql")
    assert entry is not None
    assert entry.path == (tmp_path / "adapters" / "checkpoint-400").resolve()


def test_an_artifact_brings_its_own_name_and_id(base: Path, seal_adapter):
    sealed = seal_adapter("sql")
    entry = entry_of(catalog.read(str(base), sealed.path.parent), "sql")
    assert entry is not None
    assert (entry.version, entry.artifact_id) == (sealed.version, sealed.manifest.content_id)


def test_other_things_in_the_directory_are_left_alone(base: Path, seal_adapter):
    folder = seal_adapter("sql").path.parent
    seal_adapter("merged-one", kind="merged")
    (folder / "notes.txt").write_text("hello")
    (folder / ".draft-abc").mkdir()
    (folder / ".draft-abc" / "adapter_config.json").write_text("{")
    assert [entry.name for entry in catalog.read(str(base), folder).entries] == ["base", "sql"]


def test_two_adapters_of_one_name(base: Path, seal_adapter, make_adapter):
    sealed = seal_adapter("sql")
    twin = make_adapter("sql")
    twin.rename(sealed.path.parent / "sql")
    with pytest.raises(PreflightError, match="two models are called 'sql'"):
        catalog.read(str(base), sealed.path.parent)


def test_an_adapter_called_like_the_base(base: Path, make_adapter):
    with pytest.raises(PreflightError, match="two models are called 'base'") as caught:
        catalog.read(str(base), make_adapter("base"))
    assert "--name" in caught.value.hint


@pytest.mark.parametrize("name", ["a b", "a:b", "a@b", "é"])
def test_names_that_mean_something_else_somewhere(base: Path, make_adapter, name: str):
    with pytest.raises(PreflightError, match="cannot be the name"):
        catalog.read(str(base), make_adapter(name))


def test_an_artifact_is_not_called_otherwise_by_renaming_it(base: Path, seal_adapter):
    sealed = seal_adapter("a b")
    with pytest.raises(PreflightError, match="cannot be the name") as caught:
        catalog.read(str(base), sealed.path)
    assert "--alias NAME" in caught.value.hint


def test_a_colon_in_the_bases_name(base: Path):
    with pytest.raises(PreflightError, match="cannot be the name"):
        catalog.read(str(base), name="org/model:sql")


def test_another_base(base: Path, seal_adapter, tmp_path: Path):
    sealed = seal_adapter("sql")
    other = base.rename(tmp_path / "other")
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    with pytest.raises(ArtifactError, match=r"was trained on the-base .* not on .*other"):
        catalog.read(str(other), sealed.path)


def test_another_template(base: Path, seal_adapter):
    with pytest.raises(PreflightError, match="another chat template"):
        catalog.read(str(base), seal_adapter("sql", template="{{ other }}").path)


def test_another_tokenizer(base: Path, seal_adapter):
    sealed = seal_adapter("sql")
    (base / "tokenizer.json").write_text('{"other": 1}')
    with pytest.raises(PreflightError, match="another tokenizer"):
        catalog.read(str(base), sealed.path)


def test_a_changed_byte(base: Path, seal_adapter):
    sealed = seal_adapter("sql")
    (sealed.path / "adapter_config.json").write_text((sealed.path / "adapter_config.json").read_text() + " ")
    with pytest.raises(ArtifactError, match=r"adapter_config.json has .* bytes"):
        catalog.read(str(base), sealed.path)


def test_a_rank_over_the_servers(base: Path, make_adapter):
    path = make_adapter("sql", rank=16)
    with pytest.raises(PreflightError, match="rank 16, the server takes at most 8") as caught:
        catalog.read(str(base), path, max_rank=8)
    assert "--max-rank 16" in caught.value.hint


def test_an_adapter_is_no_model(seal_adapter):
    with pytest.raises(ArtifactError, match="is an adapter, not a model") as caught:
        catalog.read(str(seal_adapter("sql").path))
    assert "--adapters" in caught.value.hint


def test_nothing_there(base: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="no adapter in"):
        catalog.read(str(base), tmp_path / "empty")
    with pytest.raises(ArtifactError, match="no directory"):
        catalog.read(str(base), tmp_path / "nowhere")


def test_who_names_the_folder_of_all_runs_is_told_where_an_adapter_lies(base: Path, tmp_path: Path):
    adapter = tmp_path / "runs" / "sql" / "artifacts" / "adapter-1"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    for folder in (tmp_path / "runs", tmp_path / "runs" / "sql"):
        with pytest.raises(ArtifactError, match="no adapter in") as caught:
            catalog.read(str(base), folder)
        assert str(adapter) in caught.value.hint


def test_adapters_of_several_places_lie_beside_each_other(base: Path, seal_adapter, make_adapter):
    sealed, plain = seal_adapter("sql"), make_adapter("plain")
    found = catalog.read(str(base), sealed.path, plain.parent, plain)
    assert [entry.name for entry in found.entries] == ["base", "sql", "plain"]


def test_a_runs_folder_is_the_adapter_that_it_trained_last(base: Path, seal_adapter, tmp_path: Path):
    run = RunDir(tmp_path)
    before, last = seal_adapter("first"), seal_adapter("second")
    for number, adapter in enumerate((before, last)):
        run.finish("train", f"input-{number}", adapter.path, tmp_path / "stages" / "train" / f"attempt-{number}")
    assert [entry.name for entry in catalog.read(str(base), run.path).entries] == ["base", "second"]


def test_two_places_with_adapters_of_one_name(base: Path, seal_adapter, make_adapter):
    sealed, plain = seal_adapter("sql"), make_adapter("sql")
    with pytest.raises(PreflightError, match="two models are called 'sql'") as caught:
        catalog.read(str(base), sealed.path, plain)
    assert str(sealed.path) in caught.value.message
    assert str(plain) in caught.value.message
    assert "adapters load" in caught.value.hint
