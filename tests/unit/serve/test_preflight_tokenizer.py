"""Adapters whose tokenizer or template lies beside them: the server must make the text that they were trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tuneship.core.errors import ArtifactError
from tuneship.serve.preflight import tokenizer

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def train(text: list[str], special: tuple[str, ...] = ("<|end|>",), size: int = 300) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        text,
        trainers.BpeTrainer(vocab_size=size, special_tokens=[*special], initial_alphabet=alphabet, show_progress=False),
    )
    return made


@pytest.fixture(scope="module")
def trained() -> str:
    return train(["the quick brown fox jumps over the lazy dog and the other dogs"] * 3).to_str()


@pytest.fixture
def folders(tmp_path: Path, trained: str) -> tuple[Path, Path]:
    """(an adapter's, its base's), the same tokenizer and template in both."""
    adapter, base = tmp_path / "sql", tmp_path / "model"
    for folder in (adapter, base):
        folder.mkdir()
        (folder / "tokenizer.json").write_text(trained)
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    return adapter, base


def facts(folders: tuple[Path, Path]) -> list[str]:
    reasons = tokenizer.check(*folders)
    assert all(reason.fix for reason in reasons)
    return [reason.fact for reason in reasons]


def test_the_bases_own(folders):
    assert facts(folders) == []


def test_none_at_all(folders):
    adapter, base = folders
    shutil.rmtree(adapter)
    adapter.mkdir()
    assert facts((adapter, base)) == []


def test_the_same_written_otherwise(folders):
    """Other versions write merges as pairs and other defaults; trainers leave their padding and truncation in it."""
    adapter, _ = folders
    own = Tokenizer.from_file(str(adapter / "tokenizer.json"))
    own.enable_padding(length=64, pad_token="<|end|>")
    own.enable_truncation(max_length=8)
    content = json.loads(own.to_str())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    del content["pre_tokenizer"]["use_regex"]
    (adapter / "tokenizer.json").write_text(json.dumps(content))
    assert facts(folders) == []


def test_the_same_template_in_the_other_place(folders):
    adapter, _ = folders
    (adapter / "chat_template.jinja").unlink()
    (adapter / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE + "\n"}))
    assert facts(folders) == []


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_another_template(folders, place: str):
    adapter, _ = folders
    (adapter / "chat_template.jinja").unlink()
    text = "{{ messages }}"
    (adapter / place).write_text(text if place.endswith("jinja") else json.dumps({"chat_template": text}))
    (reason,) = tokenizer.check(*folders)
    assert reason.fact == "was trained with another chat template than the base has"
    assert "merge it" in reason.fix


def test_a_template_where_the_base_has_none(folders):
    (folders[1] / "chat_template.jinja").unlink()
    assert facts(folders) == ["was trained with a chat template, and the base has none"]


def test_added_tokens(folders):
    adapter, _ = folders
    own = Tokenizer.from_file(str(adapter / "tokenizer.json"))
    own.add_special_tokens(["<tool>", "</tool>"])
    own.save(str(adapter / "tokenizer.json"))
    first = own.token_to_id("<tool>")
    assert facts(folders) == [
        f"adds tokens that the base does not have, 2: '<tool>' ({first}), '</tool>' ({first + 1})"
    ]


@pytest.mark.parametrize("name", ["added_tokens.json", "tokenizer_config.json"])
def test_added_tokens_of_older_files(folders, name: str):
    adapter, base = folders
    content = {"<tool>": 301} if name.startswith("added") else {"added_tokens_decoder": {"301": {"content": "<tool>"}}}
    (adapter / name).write_text(json.dumps(content))
    assert facts(folders) == ["adds tokens that the base does not have, 1: '<tool>' (301)"]
    (base / name).write_text(json.dumps(content))
    assert facts(folders) == []


def test_other_merges(folders):
    adapter, _ = folders
    train(["entirely other words were counted here, again and again"] * 3).save(str(adapter / "tokenizer.json"))
    assert any("was trained with another tokenizer: of " in fact for fact in facts(folders))


def test_the_same_tokens_and_another_normalizer(folders):
    adapter, _ = folders
    own = Tokenizer.from_file(str(adapter / "tokenizer.json"))
    own.normalizer = normalizers.Lowercase()
    own.save(str(adapter / "tokenizer.json"))
    (fact,) = facts(folders)
    assert fact.startswith("was trained with another tokenizer: of ")


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json", "merges.txt"])
def test_files_of_the_older_kinds(folders, name: str):
    adapter, _ = folders
    for folder in folders:
        (folder / "tokenizer.json").unlink()
        (folder / name).write_text("{}")
    assert facts(folders) == []
    (adapter / name).write_text("{ }")
    assert facts(folders) == [f"was trained with another tokenizer: its {name} is not the base's"]


@pytest.mark.parametrize("content", [b"[1]", b"\xff", b'{"a": "b", "chat_template": 1}'])
@pytest.mark.parametrize("name", ["tokenizer.json", "added_tokens.json", "tokenizer_config.json"])
def test_files_that_cannot_be_read(folders, name: str, content: bytes):
    (folders[0] / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=f"{name} cannot be read"):
        tokenizer.check(*folders)


def test_a_template_that_is_no_text(folders):
    (folders[0] / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ArtifactError, match=r"chat_template\.jinja cannot be read"):
        tokenizer.check(*folders)
