"""The base that an adapter from elsewhere names: another model is refused, what nobody knows is remarked."""

from __future__ import annotations

import json

import pytest

from tuneship.core.errors import ArtifactError, PreflightError
from tuneship.serve import preflight, quantized

QWEN = "Qwen/Qwen2.5-7B-Instruct"


@pytest.fixture
def on(facts, make_adapter):
    """(named, the base's id) -> the checked adapter."""

    def check(named: object, base_id: str = QWEN) -> preflight.CheckedAdapter:
        path = make_adapter("sql", config={"base_model_name_or_path": named})
        return preflight.check(path, facts._replace(record=facts.record.model_copy(update={"id": base_id})))

    return check


@pytest.mark.parametrize("named", ["qwen/another-model", "Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-14B-Instruct-bnb-4bit"])
def test_another_model_of_the_same_organisation_is_refused(on, named: str):
    with pytest.raises(
        PreflightError, match=f"'sql' says that it was trained on '{named}', and the base is {QWEN}"
    ) as no:
        on(named)
    assert f"serve it on '{named}'" in no.value.hint
    assert "a folder's name" in no.value.hint
    assert "base_model_name_or_path" in no.value.hint


@pytest.mark.parametrize(
    ("named", "base_id"),
    [
        ("/workspace/models/tiny", QWEN),
        ("../tiny", QWEN),
        ("tiny", QWEN),
        ("outputs/merged", QWEN),
        ("models/llama", QWEN),
        ("other-org/another-model", QWEN),
        ("other-org/another-model", "/models/base"),
        ("other-org/another-model", "bundled:smollm2-135m-instruct"),
        ("/root/.cache/huggingface/hub/models--other--tiny/snapshots/0123abcd", "/models/base"),
    ],
)
def test_what_may_be_the_same_is_remarked_by_both_names(on, named: str, base_id: str):
    (remark,) = on(named, base_id).remarks
    assert "'sql'" in remark
    assert base_id in remark
    assert (f"trained on '{named}'" in remark) or ("trained on 'other/tiny'" in remark)


@pytest.mark.parametrize(
    "named",
    [
        QWEN,
        "unsloth/qwen2.5-7b-instruct-unsloth-bnb-4bit",
        "unsloth/Qwen2.5-7B-Instruct-bnb-4bit",
        "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4",
        "/data/Qwen2.5-7B-Instruct/",
        "/root/.cache/huggingface/hub/models--Qwen--Qwen2.5-7B-Instruct/snapshots/0123abcd",
        "",
        None,
        7,
    ],
)
def test_nothing_is_said_of_copies_of_other_bits_and_of_no_name(on, named: object):
    assert on(named).remarks == ()


def test_a_cached_model_of_a_hub_is_as_good_as_its_id(on):
    with pytest.raises(PreflightError, match="trained on 'other/tiny', and"):
        on("/root/.cache/huggingface/hub/models--other--tiny/snapshots/0123abcd")


def test_ours_has_a_manifest_with_hashes_and_is_believed(base, seal_adapter, facts):
    assert preflight.check(seal_adapter("sql").path, facts).remarks == ()


async def test_a_load_into_a_running_server_says_it_in_its_log(world, make_adapter, capsys):
    path = make_adapter("mine", config={"base_model_name_or_path": "other-org/another-model"})
    await world.deployer.load(path, alias="mine")
    said = capsys.readouterr().err
    assert said.count("trained on 'other-org/another-model', and is served on") == 1


FORGED = "/m\nwarning: all is well\x1b[2J\u202e" + "x" * 4000


@pytest.mark.parametrize("named", [FORGED, "/models--o--a\nb/snapshots/" + "x" * 4000, "o/" + "x" * 4000])
def test_a_name_is_one_short_line_whatever_it_holds(on, named: str):
    (remark,) = on(named).remarks
    assert remark.isprintable()
    assert len(remark) < 500


def test_a_name_in_a_refusal_is_short_too(on):
    with pytest.raises(PreflightError) as no:
        on("Qwen/" + "x" * 4000)
    assert len(no.value.message) < 500
    assert len(no.value.hint) < 700


def test_all_that_an_adapter_says_of_itself_is_one_line(facts, make_adapter):
    """Its own name, names of tensors and keys of its settings."""
    forged = "a\nwarning: all is well\x1b[2J"
    silent = make_adapter(forged, change=lambda tensors: tensors.update({k: v * 0 for k, v in tensors.items()}))
    (remark,) = preflight.check(silent, facts).remarks
    assert remark.isprintable()
    bad = {f"m{forged}": 1, "base_model_name_or_path": FORGED, "use_dora": True}
    wrong = make_adapter("wrong", config=bad, change=lambda t: t.update({forged: next(iter(t.values()))}))
    with pytest.raises(PreflightError) as no:
        preflight.check(wrong, facts)
    said = f"{no.value.message}\n{no.value.hint}"
    assert all(line.isprintable() and "warning" not in line[:9] for line in said.splitlines())
    with pytest.raises(ArtifactError) as broken:
        preflight.check(make_adapter("broken", config={"rank_pattern": {forged: "no"}}), facts)
    assert broken.value.message.isprintable()


def test_the_base_that_a_manifest_names_is_one_line(seal_adapter, base):
    sealed = seal_adapter("sql")
    file = sealed.path / "artifact.json"
    manifest = json.loads(file.read_text())
    manifest["base"]["id"], manifest["quantization"]["method"] = FORGED, "nf4"
    file.write_text(json.dumps(manifest))
    (remark,) = quantized.remarks(sealed.path, base)
    assert remark.isprintable()
