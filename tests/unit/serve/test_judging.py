"""`passed` is true of one server: a version is verified again by one that is another, before it answers there."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from tests.unit.serve.listening import answering
from tests.unit.serve.test_verify_asked import Engine
from tests.unit.serve.worlds import make_world
from tuneship.core import hardware
from tuneship.core.artifact import Artifact
from tuneship.core.errors import ParityError, PreflightError, RegistryError
from tuneship.core.model_source import ModelSource
from tuneship.core.parity import write_reference
from tuneship.core.recipe import Serve
from tuneship.serve import catalog, judging, preflight
from tuneship.serve.assembly import Parts, assembled
from tuneship.serve.kept_evidence import KeptEvidence, files_of
from tuneship.serve.registry import State, Version
from tuneship.serve.registry.records import COPIES
from tuneship.serve.store import AdapterStore
from tuneship.serve.verify.verdict import Fault

SERVE = Serve(mode="adapters", dtype="float32")
OTHERS = {
    "dtype": {"dtype": "bfloat16"},
    "quantization": {"quantization": "fp8"},
    "argument": {"extra_args": ("--attention-backend", "triton")},
}


class World:
    """A base, an engine that scores what stands on it, and a folder that outlives its servers."""

    def __init__(self, base: Path, folder: Path, log: Path, engine: Engine, url: str) -> None:
        self.base, self.folder, self.log, self.engine, self.url = base, folder, log, engine, url

    @asynccontextmanager
    async def server(self, serve: Serve = SERVE, *adapters: Path) -> AsyncIterator[Parts]:
        found = catalog.read(str(self.base), *adapters, to_come=True)
        with assembled(found, serve, hardware.detect(), self.log, self.folder) as parts:
            async with parts.upstream:
                parts.upstream.open(self.url)
                self.engine.asked.clear()
                yield parts

    async def load(self, parts: Parts, path: Path) -> Version:
        """As the deployer does, of which only the judgement matters here."""
        facts = preflight.read_base(ModelSource("the-base", "", self.base))
        checked = preflight.check(path, facts)
        kept = AdapterStore(self.folder / COPIES).keep(checked)
        version = parts.registry.add("sql", checked.content_id, kept)
        loaded = asyncio.Event()
        loaded.set()
        parts.registry.loaded(version.name, await parts.deployer._verify(version, path, loaded))
        return parts.registry.promote(version.name)


@pytest.fixture
async def world(base: Path, tmp_path: Path) -> AsyncIterator[World]:
    engine = Engine(make_world())
    engine.good = "sql@"
    app = web.Application(client_max_size=2**26)
    app.router.add_post("/{path:.*}", engine.handle)
    async with answering(app) as url:
        yield World(base, tmp_path / "state", tmp_path / "log", engine, url)


@pytest.fixture
def sealed(seal_adapter, world: World) -> Artifact:
    made = seal_adapter("sql")
    write_reference(made.evidence, world.engine.world.reference)
    return made


async def first(world: World, path: Path, serve: Serve = SERVE) -> Version:
    async with world.server(serve) as parts:
        return await world.load(parts, path)


async def test_the_same_server_asks_nothing_again(world, sealed):
    before = await first(world, sealed.path)
    assert before.verified == "passed"
    async with world.server() as parts:
        await parts.verify_again()
        assert (parts.registry.find(before.name), world.engine.asked) == (before, [])


@pytest.mark.parametrize("other", OTHERS)
async def test_another_server_verifies_again_what_it_takes_over(world, sealed, other, monkeypatch):
    monkeypatch.setattr("tuneship.serve.quantized.method", lambda serve, *_: serve.quantization)  # fp8 wants a GPU
    before = await first(world, sealed.path)
    shutil.rmtree(sealed.path)  # the evidence is the server's own by now
    async with world.server(SERVE.model_copy(update=OTHERS[other])) as parts:
        await parts.verify_again()
        now = parts.registry.find(before.name)
        assert (now.state, now.verified) == (State.LIVE, "passed")
        assert now.verified_under != before.verified_under
        assert before.selector in world.engine.asked
        assert parts.registry.history(limit=1)[0].verb == "verified"
        assert parts.registry.verified_otherwise() == []


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer.json"])
async def test_a_template_or_tokenizer_that_was_changed_since(world, sealed, file):
    before = await first(world, sealed.path)
    (world.base / file).write_text('{"other": 1}')
    async with world.server() as parts:
        assert [version.name for version in parts.registry.verified_otherwise()] == [before.name]


async def test_what_is_another_model_there_never_answers(world, sealed):
    before = await first(world, sealed.path)
    world.engine.good = "nobody"  # from now on another adapter answers
    async with world.server(SERVE.model_copy(update=OTHERS["dtype"])) as parts:
        with pytest.raises(ParityError) as refused:
            await parts.verify_again()
        assert before.name in refused.value.message
        assert before.verified_under in refused.value.message
        assert f"tuneship adapters unload {before.name} --state " in refused.value.hint
        assert parts.registry.find(before.name) == before


async def test_who_was_not_asked_is_asked_by_a_server_that_verifies(world, sealed):
    quiet = SERVE.model_copy(update={"verify": False})
    before = await first(world, sealed.path, quiet)
    assert (before.verified, before.verified_under, world.engine.asked) == ("not asked", "not asked", [])
    async with world.server() as parts:
        await parts.verify_again()
        assert parts.registry.find(before.name).verified == "passed"
    async with world.server(quiet) as parts:
        await parts.verify_again()
        assert parts.registry.find(before.name).verified == "not asked"


async def test_evidence_that_is_gone_is_no_proof(world, sealed, capsys, monkeypatch):
    before = await first(world, sealed.path)
    shutil.rmtree(world.folder / "evidence")
    monkeypatch.setattr(judging, "verify", _no_evidence)
    async with world.server(SERVE.model_copy(update=OTHERS["dtype"])) as parts:
        await parts.verify_again()
        assert parts.registry.find(before.name).verified == "no evidence"
    assert "its evidence is gone: load it again" in capsys.readouterr().err


async def test_evidence_that_is_given_again_is_as_good(world, sealed):
    """As to a server whose state is of a tuneship that kept none."""
    before = await first(world, sealed.path)
    shutil.rmtree(world.folder / "evidence")
    async with world.server(SERVE.model_copy(update=OTHERS["dtype"]), sealed.path) as parts:
        await parts.verify_again()
        assert parts.registry.find(before.name).verified == "passed"
        assert (world.folder / "evidence" / before.path.name / "evidence").is_dir()


async def test_evidence_comes_and_goes_with_its_version(world, sealed, make_adapter, tmp_path):
    async with world.server() as parts:
        version = await world.load(parts, sealed.path)
        folder = world.folder / "evidence" / version.path.name
        assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")) == [
            "artifact.json",
            "evidence",
            "evidence/reference.jsonl",
        ]
        assert json.loads((folder / "artifact.json").read_text())["content_id"] == version.content_id
        parts.registry.unloaded(parts.registry.drain(version.name).name)
        kept = KeptEvidence(world.folder / "evidence")
        half = world.folder / "evidence" / ".draft-of-another-load"
        half.mkdir()
        strangers = kept.strangers({"plain-1"})
        came = world.folder / "evidence" / "came-1"
        came.mkdir()  # meanwhile
        plain = make_adapter("plain")
        kept.keep(version._replace(path=tmp_path / "plain-1"), plain, files_of(plain), strangers)
        assert sorted(came.parent.iterdir()) == [half, came]
        kept.sweep({"plain-1"})
        assert list((world.folder / "evidence").iterdir()) == []  # a plain directory has none


async def test_evidence_that_leads_elsewhere_is_refused_before_it_is_read(world, sealed, tmp_path):
    elsewhere = tmp_path / "elsewhere.jsonl"
    (sealed.evidence / "reference.jsonl").rename(elsewhere)
    (sealed.evidence / "reference.jsonl").symlink_to(elsewhere)
    async with world.server() as parts:
        with pytest.raises(PreflightError, match=r"reference\.jsonl is a link that leaves its directory"):
            await world.load(parts, sealed.path)
        assert not world.engine.asked
    assert not (world.folder / "evidence").exists()


async def test_evidence_that_cannot_be_kept_asks_no_more(world, sealed):
    version = await first(world, sealed.path)
    shutil.rmtree(world.folder / "evidence")
    (world.folder / "evidence").write_text("no folder")
    async with world.server() as parts:
        before, loaded = asyncio.all_tasks(), asyncio.Event()
        with pytest.raises(RegistryError, match=r"evidence cannot be copied to .*: File exists"):
            await parts.deployer._verify(version, sealed.path, loaded)
        assert asyncio.all_tasks() == before
        loaded.set()
        await asyncio.sleep(0.05)
        assert not world.engine.asked


async def test_what_is_remembered_of_a_base_is_of_the_engine_of_the_moment(world, make_adapter, monkeypatch):
    memories = []

    async def verify(*_: object, memory: judging.Memory, **__: object) -> judging.Verdict:
        memories.append(memory)
        return await _no_evidence()

    monkeypatch.setattr(judging, "verify", verify)
    async with world.server() as parts:
        await world.load(parts, make_adapter("sql"))
        (memory,) = memories
        for engine in (object(), object()):
            parts.supervisor.engine = engine
            assert memory._engine() is engine


async def _no_evidence(*_: object, **__: object) -> judging.Verdict:
    return judging.Verdict(judging.Outcome.NO_EVIDENCE, Fault.NONE, "nobody stored what it says")
