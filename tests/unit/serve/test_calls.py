"""No request can choose an adapter other than by `model`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneship.serve.calls import ENGINE_ONLY, address
from tuneship.serve.catalog import Entry
from tuneship.serve.refusals import Refusal

BASE = Entry("org/base", "org/base@1", None, Path("/b"), "", "b")
SQL = Entry("sql", "sql@2", "sql@2", Path("/s"), "2", "b")

values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3))
bodies = st.dictionaries(st.sampled_from(sorted(ENGINE_ONLY)) | st.text(max_size=12), values, max_size=6)


@given(body=bodies, entry=st.sampled_from([BASE, SQL]))
def test_the_selector_is_the_catalogs_or_the_request_is_refused(body, entry):
    asked = {**body, "model": entry.name}
    if ENGINE_ONLY & asked.keys():
        with pytest.raises(Refusal) as caught:
            address(asked, entry)
        assert caught.value.status == 400
        assert caught.value.version == entry.version
        return
    sent = json.loads(address(asked, entry))
    assert sent.pop("lora_path", None) == entry.selector
    assert sent == asked


def test_what_the_client_sent_arrives_as_it_was():
    asked = {"model": "sql", "messages": [{"role": "user", "content": "é😀 \u2028 \ud83d"}], "temperature": 0.1}
    assert json.loads(address(asked, SQL)) == {**asked, "lora_path": "sql@2"}
