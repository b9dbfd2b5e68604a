"""What may be served, and what is refused by name before an engine starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuneship.core.errors import ArtifactError, PreflightError
from tuneship.serve import catalog


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
    sql = found.find("sql")
    assert sql is not None
    assert sql.selector == sql.version
    assert sql.version == f"sql@{sql.artifact_id[:12]}"


def test_the_directory_of_one_adapter_will_do(base: Path, make_adapter):
    assert catalog.read(str(base), make_adapter("sql")).find("sql")


def test_a_link_is_called_by_its_own_name(base: Path, make_adapter, tmp_path: Path):
    (tmp_path / "chosen").mkdir()
    (tmp_path / "chosen" / "sql").symlink_to(make_adapter("checkpoint-400"))
    entry = catalog.read(str(base), tmp_path / "chosen").find("sql")
    assert entry is not None
    assert entry.path == (tmp_path / "adapters" / "checkpoint-400").resolve()


def test_an_artifact_brings_its_own_name_and_id(base: Path, seal_adapter):
    sealed = seal_adapter("sql")
    entry = catalog.read(str(base), sealed.path.parent).find("sql")
    assert entry is not None
    assert (entry.version, entry.artifact_id) == (sealed.version, sealed.manifest.content_id)


def test_other_things_in_the_directory_are_left_alone(base: Path, seal_adapter):
    folder = seal_adapter("sql").path.parent
    seal_adapter("merged-one", kind="merged")
    (folder / "notes.txt").write_text("hello")
    (folder / ".draft-abc").mkdir()
    (folder / ".draft-abc" / "adapter_config.json").write_text("{")
    assert [entry.name for entry in catalog.read(str(base), folder).entries] == ["base", "sql"]


@pytest.mark.parametrize("name", ["sql:2", "base:sql", "", None, 7, ["sql"], "SQL", "sql ", "sql@0"])
def test_only_exact_names_are_found(base: Path, make_adapter, name: object):
    assert catalog.read(str(base), make_adapter("sql")).find(name) is None


def test_two_adapters_of_one_name(base: Path, seal_adapter, make_adapter):
    sealed = seal_adapter("sql")
    twin = make_adapter("sql")
    twin.rename(sealed.path.parent / "sql")
    with pytest.raises(PreflightError, match="two models are called 'sql'"):
        catalog.read(str(base), sealed.path.parent)


def test_an_adapter_called_like_the_base(base: Path, make_adapter):
    with pytest.raises(PreflightError, match="two models are called 'base'"):
        catalog.read(str(base), make_adapter("base"))


@pytest.mark.parametrize("name", ["a b", "a:b", "a@b", "é"])
def test_names_that_mean_something_else_somewhere(base: Path, make_adapter, name: str):
    with pytest.raises(PreflightError, match="cannot be the name"):
        catalog.read(str(base), make_adapter(name))


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


def test_truncated_weights_of_a_plain_adapter(base: Path, make_adapter):
    path = make_adapter("sql")
    weights = path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match=r"adapter_model.safetensors cannot be read .* truncated"):
        catalog.read(str(base), path)


def test_weights_that_are_missing(base: Path, make_adapter):
    path = make_adapter("sql")
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"has no adapter_model\.safetensors"):
        catalog.read(str(base), path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"r": "x", "lora_alpha": 1, "peft_type": 1, "target_modules": []}'])
def test_an_unreadable_configuration(base: Path, make_adapter, text: str):
    path = make_adapter("sql")
    (path / "adapter_config.json").write_text(text)
    with pytest.raises(ArtifactError, match="is not an adapter's configuration"):
        catalog.read(str(base), path)


def test_a_rank_over_the_servers(base: Path, make_adapter):
    path = make_adapter("sql", rank=16)
    with pytest.raises(PreflightError, match="rank 16, the server takes at most 8") as caught:
        catalog.read(str(base), path, max_rank=8)
    assert "--max-rank 16" in caught.value.hint


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1]},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 2}},
        {"bias": "all"},
        {"peft_type": "LOHA"},
        {"target_modules": ".*q_proj"},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=lambda config: next(iter(config)),
)
def test_what_sglang_would_answer_wrongly(base: Path, make_adapter, config: dict):
    with pytest.raises(PreflightError, match="adapter 'sql'"):
        catalog.read(str(base), make_adapter("sql", config=config))


def test_what_peft_writes_by_default_is_fine(base: Path, make_adapter):
    config = {"use_dora": False, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}, "bias": "none"}
    assert catalog.read(str(base), make_adapter("sql", config=config)).find("sql")


def test_shapes_of_another_model(base: Path, make_adapter):
    with pytest.raises(PreflightError, match=r"does not fit .*lora_A.weight is \(4, 16\), the base wants \(4, 8\)"):
        catalog.read(str(base), make_adapter("sql", hidden=16))


def test_layers_that_the_base_does_not_have(base: Path, make_adapter):
    with pytest.raises(PreflightError, match=r"has nothing for its tensor .*layers\.7"):
        catalog.read(str(base), make_adapter("sql", module="model.layers.7.self_attn.q_proj"))


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
