"""What `tuneship verify RUN` asks of a real door: the version that lies in the run, whichever one is live."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.unit.serve.conftest import VOCABULARY
from tests.unit.serve.listening import answering, listening
from tests.unit.serve.worlds import PROMPT, World, make_world
from tuneship.core.artifact import MANIFEST, Artifact
from tuneship.core.errors import EndpointError
from tuneship.core.parity import write_reference
from tuneship.core.rundir import RunDir
from tuneship.serve.catalog import Entry
from tuneship.serve.dressed import dressed_version
from tuneship.serve.gateway import build_door
from tuneship.serve.metrics import Live, Metrics
from tuneship.serve.registry import State, Version
from tuneship.serve.routes import Routes
from tuneship.serve.running import Running, announced
from tuneship.serve.upstream import Upstream
from tuneship.serve.verify import asked, commands
from tuneship.serve.verify.door import DoorScorer

OTHER = "f" * 64
"""Content id of a version of somebody else's."""


class Engine:
    """Scores as `World` says, by the adapter's name; a selector that it has no figures for is `other`."""

    def __init__(self, world: World) -> None:
        self.world, self.asked, self.good = world, [], ""
        self.rows = {tuple(row.input_ids): number for number, row in enumerate(world.reference)}

    def figures(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        selector = body.get("lora_path")
        self.asked.append(selector)
        name = None if selector is None else "good" if selector.startswith(self.good) else "other"
        found = []
        for ids, start in zip(body["input_ids"], body["logprob_start_len"], strict=True):
            row = self.world.server[name][self.rows[tuple(ids)]]
            scored = [[figure, token, None] for figure, token in zip(row[start:], ids[start:], strict=True)]
            found.append({"meta_info": {"input_token_logprobs": scored}})
        return found

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.json()
        if request.path == "/generate":
            return web.json_response(self.figures(body))
        row = self.world.reference[int(body["messages"][0]["content"])]
        return web.json_response({"tokens": row.input_ids[:PROMPT]})


class Server:
    """A door before `Engine`, with the versions that a test gives it; `lists` is how often it said what it serves."""

    def __init__(self, engine: Engine, routes: Routes, url: str) -> None:
        self.engine, self.routes, self.url, self.lists = engine, routes, url, 0

    def serve(self, *versions: tuple[str, str, State]) -> None:
        self.routes.update(
            Version(alias, content, "b", Path("/v"), state, 1.0, 1, pinned=False, verified="passed", changed_at="")
            for alias, content, state in versions
        )


@pytest.fixture
async def server(base: Path) -> AsyncIterator[Server]:
    world = make_world()
    rows = [row.model_copy(update={"input_ids": [i % VOCABULARY for i in row.input_ids]}) for row in world.reference]
    engine = Engine(world._replace(reference=rows))
    app = web.Application(client_max_size=2**26)
    app.router.add_post("/{path:.*}", engine.handle)
    async with answering(app) as url, Upstream(url) as upstream:
        routes = Routes(Entry("the-base", "the-base@1", None, base, "", "b"))
        door = build_door(routes, upstream, Metrics(Live), lambda: True)

        async def counted(scope: Any, receive: Any, send: Any) -> None:
            made.lists += scope["path"] == "/v1/models"
            await door(scope, receive, send)

        async with listening(counted) as open_:
            made = Server(engine, routes, open_.url)
            yield made


@pytest.fixture
def trained(server: Server, seal_adapter: Callable[..., Artifact], tmp_path: Path) -> Artifact:
    """A run in `tmp_path` with the adapter `sql`, whose evidence is the world's."""
    sealed = seal_adapter("sql")
    write_reference(sealed.evidence, server.engine.world.reference)
    RunDir(tmp_path).finish("train", "id", sealed.path, Path("attempt-1"))
    server.engine.good = sealed.version
    return sealed


async def ask(path: Path, server: Server, model: str = "") -> commands._Asked:
    return (await commands._ask(path, server.url, model, 16, "", record=False))[1]


@pytest.mark.parametrize("state", [State.LOADED, State.CANARY])
async def test_the_runs_own_version_is_asked_while_another_one_is_live(server, trained, tmp_path, state):
    server.serve(("sql", OTHER, State.LIVE), ("sql", trained.manifest.content_id, state))
    for path in (tmp_path, trained.path):
        found = await ask(path, server)
        assert (found.model, found.version) == (trained.version, trained.version)
        assert found.verdict.passed, found.verdict.message
    assert {selector for selector in server.engine.asked if selector} == {f"{trained.version}#1"}


async def test_it_is_found_under_another_alias_too_and_the_server_is_asked_once_what_it_serves(
    server, trained, tmp_path
):
    server.engine.good = f"orders@{trained.id12}"
    server.serve(("orders", trained.manifest.content_id, State.LIVE))
    found = await ask(tmp_path, server)
    assert found.model == f"orders@{trained.id12}"
    assert found.verdict.passed
    assert server.lists == 1


async def test_one_that_is_not_loaded_is_not_mistaken_for_the_one_that_is_live(server, trained, tmp_path):
    server.serve(("sql", OTHER, State.LIVE))
    with pytest.raises(EndpointError) as refused:
        await ask(tmp_path, server)
    assert f"answers 'sql' with sql@{OTHER[:12]}" in refused.value.message
    assert f"{trained.version} is not loaded" in refused.value.message
    assert refused.value.hint.startswith(f"tuneship adapters load {trained.path} --alias sql")
    assert not server.engine.asked
    server.serve()
    for mode, way in (
        ("adapters", f"tuneship adapters load {trained.path}"),
        ("merged", f"serve its base with --adapters {trained.path}"),
    ):
        with (
            announced(Running(url=server.url, admin_url="http://127.0.0.1:1", admin_key="k", mode=mode)),
            pytest.raises(EndpointError, match="serves no model 'sql'") as refused,
        ):
            await ask(tmp_path, server)
        assert refused.value.hint.startswith(way)
        assert "adapters load" not in refused.value.hint or mode == "adapters"


@pytest.mark.parametrize("status", [200, 401, 403, 404, 503])
async def test_only_404_means_that_a_version_is_not_loaded(status: int):
    async def answer(_: web.Request) -> web.Response:
        return web.Response(status=status, text="the server's words")

    app = web.Application()
    app.router.add_get("/v1/models/sql@1", answer)
    async with answering(app) as url, DoorScorer(url) as scorer:
        if status in {200, 404}:
            assert await scorer.knows("sql@1") is (status == 200)
            return
        with pytest.raises(EndpointError, match="refused") as refused:
            await scorer.knows("sql@1")
        said = ("refused the key", "--key-env") if status == 401 else (str(status), "the server's words")
        assert all(word in f"{refused.value.message} {refused.value.hint}" for word in said)


async def test_a_name_that_is_given_is_the_one_that_is_asked(server, trained, tmp_path):
    server.serve(("sql", OTHER, State.LIVE), ("sql", trained.manifest.content_id, State.LOADED))
    found = await ask(tmp_path, server, "sql")
    assert (found.model, found.version) == ("sql", f"sql@{OTHER[:12]}")
    assert not found.verdict.passed


async def test_the_live_version_of_its_own_alias_is_among_those_that_may_answer_instead(server, trained):
    server.serve(("sql", OTHER, State.LIVE), ("sql", trained.manifest.content_id, State.LOADED))
    async with DoorScorer(server.url) as scorer:
        served = await scorer.served()
        live = f"sql@{OTHER[:12]}"
        assert asked.others(trained.version, scorer, served) == {live: live}
        assert asked.others(live, scorer, served) == {}


async def test_a_base_under_the_template_of_training_is_known_by_its_weights(server, trained, tmp_path, base):
    """`serve --template` makes another version of a base: its weights are the same."""
    manifest = trained.manifest
    plain = f"the-base@{manifest.base.weights_sha256[:12]}"
    for version, own in [
        (plain, True),
        (f"the-base@{dressed_version(plain, manifest.template.text)}", True),
        (f"the-base@{dressed_version(plain, 'another template')}", False),
        ("the-base@0123456789ab", False),
    ]:
        server.routes._base = server.routes.base._replace(version=version)
        server.serve()
        async with DoorScorer(server.url) as scorer:
            served = await scorer.served()
            assert asked.on_own_base(trained, scorer, served) is own, version


@pytest.mark.parametrize(
    ("name", "says"),
    [("m\nerror: gone\x1b[2J" + "x" * 1000, "serves no model"), ("sql@\x1b[2J", "answers 'sql@.x1b.2J' with another")],
)
async def test_a_name_that_nothing_can_have_is_repeated_on_one_line(server, trained, name: str, says: str):
    manifest = trained.manifest.model_copy(update={"name": name})
    (trained.path / MANIFEST).write_text(manifest.model_dump_json(by_alias=True))
    server.serve(("sql", OTHER, State.LIVE))
    with pytest.raises(EndpointError, match=says) as caught:
        await ask(trained.path, server)
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 500
    assert caught.value.hint.isprintable()


async def test_too_few_tokens_say_what_to_do(server, trained, tmp_path, capsys):
    server.serve(("sql", trained.manifest.content_id, State.LIVE))
    row = server.engine.world.reference[0]
    mask = [*row.loss_mask[: PROMPT + 3], *[0] * (len(row.loss_mask) - PROMPT - 3)]
    write_reference(trained.evidence, [row.model_copy(update={"loss_mask": mask})])
    with pytest.raises(SystemExit) as ended:
        await asyncio.to_thread(commands.verify, tmp_path, url=server.url)
    assert ended.value.code == 3
    said = capsys.readouterr().err
    assert "3 tokens are too few to tell" in said
    assert "hint: " in said
    assert "data.heldout" in said
    assert "--rows" in said
