"""The scoring verb, on a real port, in front of an engine whose figures are known."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from aiohttp import web

from tests.unit.serve.listening import answering
from tuneship.serve.catalog import Entry
from tuneship.serve.gateway import build_door
from tuneship.serve.metrics import Live, Metrics
from tuneship.serve.registry import State, Version
from tuneship.serve.routes import Routes
from tuneship.serve.scoring import MAX_ROWS, MAX_TOKENS
from tuneship.serve.upstream import Upstream

BASE = Entry("org/base", "org/base@1", None, Path("/b"), "", "b")
SQL = Version("sql", "2" * 64, "b", Path("/s"), State.LIVE, 1.0, 3, pinned=False, verified="passed", changed_at="")
URL = "/v1/logprobs"


class Engine:
    """Answers `/generate` as SGLang does: no figure for the first token asked about, -id for the others."""

    def __init__(self) -> None:
        self.bodies: list[dict] = []
        self.answer = self.figures

    def figures(self, body: dict) -> list[dict]:
        rows = []
        for ids, start in zip(body["input_ids"], body["logprob_start_len"], strict=True):
            scored = [[None if i == 0 else -float(token), token, None] for i, token in enumerate(ids[start:])]
            rows.append({"text": "", "meta_info": {"input_token_logprobs": scored}})
        return rows

    async def handle(self, request: web.Request) -> web.Response:
        self.bodies.append({"path": request.path, **await request.json()})
        return web.json_response(self.answer(self.bodies[-1]))


@pytest.fixture
async def engine() -> AsyncIterator[tuple[Engine, str]]:
    scripted = Engine()
    app = web.Application(client_max_size=2**26)
    app.router.add_post("/{path:.*}", scripted.handle)
    async with answering(app) as url:
        yield scripted, url


@pytest.fixture
async def door(engine) -> AsyncIterator[httpx.AsyncClient]:
    async with Upstream(engine[1]) as upstream:
        app = build_door(Routes(BASE, (SQL,)), upstream, Metrics(Live), lambda: True)
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://door") as it:
            yield it


@pytest.mark.parametrize(
    ("name", "version", "adapter"), [(BASE.name, BASE.version, None), ("sql", SQL.name, SQL.selector)]
)
async def test_every_token_from_start_on_has_its_figure(door, engine, name, version, adapter):
    asked = {"model": name, "input_ids": [[7, 8, 9], [5], [1, 2, 3, 4]], "start": [0, 0, 2]}
    response = await door.post(URL, json=asked)
    assert response.status_code == 200
    assert response.headers["x-tuneship-version"] == version
    found = response.json()
    assert (found["object"], found["model"]) == ("list", name)
    assert [row["index"] for row in found["data"]] == [0, 1, 2]
    assert [row["token_logprobs"] for row in found["data"]] == [[0, -8, -9], [0], [-3, -4]]
    (sent,) = engine[0].bodies
    assert sent["path"] == "/generate"
    assert sent.get("lora_path") == adapter
    assert sent["sampling_params"]["max_new_tokens"] == 0
    assert sent["logprob_start_len"] == [0, 0, 1]


async def test_without_start_it_begins_at_the_first_token(door):
    response = await door.post(URL, json={"model": "sql", "input_ids": [[7, 8]]})
    assert response.json()["data"] == [{"index": 0, "token_logprobs": [0.0, -8.0]}]


@pytest.mark.parametrize(
    "wrong",
    [
        {"input_ids": []},
        {"input_ids": [[]]},
        {"input_ids": [1, 2]},
        {"input_ids": [["1"]]},
        {"input_ids": [[True]]},
        {"input_ids": [[-1]]},
        {"input_ids": [[2**31]]},
        {"input_ids": [[1]] * (MAX_ROWS + 1)},
        {"input_ids": [[1] * (MAX_TOKENS + 1)]},
        {"start": [2]},
        {"start": [-1]},
        {"start": [0, 0]},
        {"start": []},
        {"lora_path": "sql@2"},
        {"top_logprobs": 3},
    ],
    ids=lambda wrong: json.dumps(wrong)[:30],
)
async def test_what_makes_no_sense_is_refused(door, engine, wrong):
    response = await door.post(URL, json={"model": "sql", "input_ids": [[1, 2]], **wrong})
    assert response.status_code == 400
    assert response.json()["error"]["param"] in wrong or "start" in wrong
    assert response.headers["x-tuneship-version"] == SQL.name
    assert not engine[0].bodies


async def test_an_unknown_model(door, engine):
    response = await door.post(URL, json={"model": "nobody", "input_ids": [[1]]})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert not engine[0].bodies


@pytest.mark.parametrize(
    "answer",
    [
        {},
        [],
        [{"meta_info": {}}],
        [{"meta_info": {"input_token_logprobs": [[None, 1, None], [-1.0, 3, None]]}}],
        [{"meta_info": {"input_token_logprobs": [[None, 1, None], [None, 2, None]]}}],
        [{"meta_info": {"input_token_logprobs": [[-1.0, 2, None]]}}],
    ],
    ids=["no list", "no row", "no figures", "other tokens", "no figure", "too few"],
)
async def test_an_engine_that_answers_something_else(door, engine, answer):
    engine[0].answer = lambda _: answer
    response = await door.post(URL, json={"model": "sql", "input_ids": [[1, 2]]})
    assert response.status_code == 502
    assert response.json()["error"]["code"] == "engine_error"


async def test_tokenize_goes_to_the_engine_for_models_of_the_table(door, engine):
    engine[0].answer = lambda _: {"tokens": [1, 2]}
    response = await door.post("/v1/tokenize", json={"model": "sql", "prompt": "a"})
    assert response.json() == {"tokens": [1, 2]}
    assert engine[0].bodies[0]["path"] == "/v1/tokenize"
    assert (await door.post("/v1/tokenize", json={"model": "nobody", "prompt": "a"})).status_code == 404
