"""Facts about a checkpoint folder: which base it is, its template, where it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tuneship.core import checkpoint
from tuneship.core.errors import ArtifactError
from tuneship.core.files import sha256_file


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNESHIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "eos_token_id": 2}')
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"first")
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"second")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_a_base_is_known_by_its_weights(model: Path):
    base = checkpoint.identify(model, "org/base", "main")
    assert (base.id, base.revision, base.architecture) == ("org/base", "main", "LlamaForCausalLM")
    (model / "tokenizer.json").write_text('{"another": 1}')
    assert checkpoint.weights_sha256(model) == base.weights_sha256
    (model / "model-00002-of-00002.safetensors").write_bytes(b"SECOND")
    assert checkpoint.weights_sha256(model) != base.weights_sha256


def test_a_hub_link_is_not_read_again(model: Path, tmp_path: Path):
    """The hub cache names blobs by their SHA-256; a link with another name is read."""
    plain = checkpoint.weights_sha256(model)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for file in list(model.glob("*.safetensors")):
        blob = file.rename(blobs / sha256_file(file))
        file.symlink_to(blob)
    assert checkpoint.weights_sha256(model) == plain

    linked = next(iter(sorted(model.glob("*.safetensors"))))
    target = linked.resolve()
    target.write_bytes(b"FIRST")  # same size and name: believed, which shows that it was not read
    assert checkpoint.weights_sha256(model) == plain
    renamed = target.rename(blobs / "weights.bin")
    linked.unlink()
    linked.symlink_to(renamed)
    assert checkpoint.weights_sha256(model) != plain


def test_a_remembered_hash_ends_with_a_change(model: Path, own_cache: Path):
    before = checkpoint.weights_sha256(model)
    assert len(list((own_cache / "hashes").iterdir())) == 2
    assert checkpoint.weights_sha256(model) == before
    for memo in (own_cache / "hashes").iterdir():
        memo.write_text("not JSON")
    assert checkpoint.weights_sha256(model) == before


def test_the_tokenizer_has_a_hash_of_its_own(model: Path):
    before = checkpoint.tokenizer_sha256(model)
    (model / "merges.txt").write_text("a b")
    assert checkpoint.tokenizer_sha256(model) != before


@pytest.mark.parametrize(
    ("files", "template"),
    [
        ({"chat_template.jinja": "{{ file }}"}, "{{ file }}"),
        ({"tokenizer_config.json": {"chat_template": "{{ inline }}"}}, "{{ inline }}"),
        (
            {"chat_template.jinja": "{{ file }}", "tokenizer_config.json": {"chat_template": "{{ inline }}"}},
            "{{ file }}",
        ),
        (
            {
                "tokenizer_config.json": {
                    "chat_template": [
                        {"name": "tool_use", "template": "{{ tools }}"},
                        {"name": "default", "template": "{{ named }}"},
                    ]
                }
            },
            "{{ named }}",
        ),
        ({"tokenizer_config.json": {"chat_template": [{"name": "rag", "template": "{{ rag }}"}]}}, ""),
        ({"tokenizer_config.json": {"chat_template": None}}, ""),
        ({"tokenizer_config.json": {}}, ""),
        ({}, ""),
    ],
)
def test_the_forms_of_a_chat_template(model: Path, files: dict[str, object], template: str):
    for name, content in files.items():
        (model / name).write_text(content if isinstance(content, str) else json.dumps(content))
    assert checkpoint.chat_template(model) == template


@pytest.mark.parametrize(
    ("generation", "ends"),
    [('{"eos_token_id": [5, 6]}', [5, 6]), ('{"eos_token_id": 7}', [7]), ("{}", [2]), ("broken", [2]), (None, [2])],
)
def test_where_generation_ends(model: Path, generation: str | None, ends: list[int]):
    if generation is not None:
        (model / "generation_config.json").write_text(generation)
    assert checkpoint.end_token_ids(model) == ends


def test_no_end_is_an_empty_list(model: Path):
    (model / "config.json").write_text("{}")
    assert checkpoint.end_token_ids(model) == []


@pytest.mark.parametrize(
    ("missing", "says"), [("config.json", "it has no config.json"), ("*.safetensors", "has no \\*.safetensors weights")]
)
def test_what_is_no_model_is_refused(model: Path, missing: str, says: str):
    for file in list(model.glob(missing)):
        file.unlink()
    with pytest.raises(ArtifactError, match=says):
        checkpoint.identify(model, "org/base", "main")


def test_who_names_a_run_is_told_which_model_lies_in_it(tmp_path: Path):
    merged = tmp_path / "run" / "artifacts" / "merged-1"
    merged.mkdir(parents=True)
    for folder in (tmp_path / "run", merged.parent):
        with pytest.raises(ArtifactError) as caught:
            checkpoint.weights_sha256(folder)
        assert caught.value.hint == f"the model in it is {merged}: name that"


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"[" * 200_000], ids=["cut", "a list", "bytes", "deep"])
def test_a_broken_config_is_refused(model: Path, content: bytes):
    (model / "config.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"config.json cannot be read"):
        checkpoint.read_config(model)


def test_no_tokenizer_is_refused(model: Path):
    (model / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match="has no tokenizer"):
        checkpoint.tokenizer_sha256(model)
