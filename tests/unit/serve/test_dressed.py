"""A base under another chat template: the same weights and tokens, and nothing of the base is changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tuneship.core import checkpoint
from tuneship.core.errors import PreflightError
from tuneship.core.files import sha256_file, sha256_listing
from tuneship.core.hardware import Hardware
from tuneship.core.recipe import Serve
from tuneship.serve import bounds, catalog, launch
from tuneship.serve.dressed import Dress

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}\n"


def state_of(folder: Path) -> str:
    return sha256_listing((p.name, p.stat().st_size, sha256_file(p)) for p in sorted(folder.iterdir()))


@pytest.fixture
def dress(tmp_path: Path) -> Dress:
    return Dress(TEMPLATE, tmp_path / "engine.log")


def test_it_has_the_template_and_everything_else_of_its_own(base: Path, dress: Dress):
    before = state_of(base)
    worn = dress.put_on(base)
    assert checkpoint.chat_template(worn) == TEMPLATE
    assert checkpoint.weights_sha256(worn) == checkpoint.weights_sha256(base)
    assert checkpoint.tokenizer_sha256(worn) == checkpoint.tokenizer_sha256(base)
    assert {path.name for path in base.iterdir()} <= {path.name for path in worn.iterdir()}
    dress.take_off()
    assert not worn.exists()
    assert state_of(base) == before


def test_a_template_in_a_file_of_the_bases_own_is_not_written_through(base: Path, dress: Dress):
    (base / "chat_template.jinja").write_text("{{ own }}")
    dress.put_on(base)
    assert (base / "chat_template.jinja").read_text() == "{{ own }}"


def test_answers_end_where_those_of_its_adapters_do(base: Path, seal_adapter, dress: Dress):
    sealed = seal_adapter("sql", template=TEMPLATE)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 7, "top_k": 3}))
    worn = dress.put_on(base, [sealed.path, base])
    assert json.loads((worn / "generation_config.json").read_text()) == {"eos_token_id": [7, 2], "top_k": 3}


def test_an_adapter_of_that_template_is_served_on_it_and_no_other(base: Path, seal_adapter, dress: Dress):
    sealed, plain = seal_adapter("sql", template=TEMPLATE), seal_adapter("mail")
    with pytest.raises(PreflightError, match="another chat template") as refused:
        catalog.read(str(base), sealed.path)
    assert "merge it" in refused.value.hint
    (sealed.path / "chat_template.jinja").write_text(TEMPLATE)
    with pytest.raises(PreflightError) as refused:
        catalog.read(str(base), plain.path, dress=dress)
    found = catalog.read(str(base), seal_adapter("sales", template=TEMPLATE).path, dress=dress)
    assert [entry.name for entry in found.entries] == ["base", "sales"]
    assert found.model_path == found.origin.path != base
    assert found.base.version not in {catalog.read(str(base)).base.version, ""}


def test_the_door_and_the_engine_read_its_template(base: Path, dress: Dress):
    shows = Dress("{{ tools }}<tool_call>", dress.log)
    found = catalog.read(str(base), dress=shows)
    assert found.mode == "base"
    assert bounds.facts(found.model_path).takes_tools
    config = launch.configure(Serve(), found, Hardware((), "", "cpu", 2, 2**34), 1)
    assert config.tool_parser == "qwen"
    assert config.model_path == found.model_path


def test_a_merged_model_keeps_its_own(seal_adapter, dress: Dress):
    merged = seal_adapter("invoice", kind="merged")
    found = catalog.read(str(merged.path), dress=dress)
    assert (found.mode, found.model_path, found.base.version) == ("merged", merged.path, merged.version)
