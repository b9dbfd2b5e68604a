"""A base and adapters as files alone: enough for every check that happens before an engine starts."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from safetensors.numpy import save_file

from tests.layer_shapes import layer_matrices
from tests.unit.serve.listening import answering
from tuneship.core import artifact, checkpoint
from tuneship.core.artifact import Artifact, LoraRecord, Manifest, QuantizationRecord, TemplateRecord
from tuneship.core.errors import PreflightError, TuneshipError
from tuneship.core.files import sha256_text
from tuneship.core.model_source import ModelSource
from tuneship.serve import preflight
from tuneship.serve.books import Books, Engine
from tuneship.serve.catalog import Entry
from tuneship.serve.deploy import Deployer
from tuneship.serve.metrics import Live, Metrics
from tuneship.serve.preflight import BaseModel, CheckedAdapter, Limits
from tuneship.serve.registry import Registry, State, Version
from tuneship.serve.routes import Routes
from tuneship.serve.slots import Slots
from tuneship.serve.store import AdapterStore
from tuneship.serve.supervisor import Patience, Phase, Supervisor
from tuneship.serve.upstream import Upstream

HIDDEN, KEYS, INNER, LAYERS, VOCABULARY = 8, 4, 12, 2, 16
SHAPES = layer_matrices(HIDDEN, KEYS, INNER)
"""Of one decoder layer: {module: (out, in)}."""

MakeAdapter = Callable[..., Path]
SealAdapter = Callable[..., Artifact]
Check = Callable[..., CheckedAdapter]
Refusal = Callable[..., PreflightError]
LIMITS = Limits()
SERVED_BASE = Entry("the-base", "the-base@1", None, Path("/b"), "", "b")
LOAD, UNLOAD, GENERATE = "/load_lora_adapter", "/unload_lora_adapter", "/generate"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Copies of adapters are not left in the user's cache."""
    monkeypatch.setenv("TUNESHIP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A checkpoint folder with one real weight, a tokenizer and a chat template."""
    return write_base(tmp_path / "base", seed=0)


@pytest.fixture
def make_adapter(tmp_path: Path) -> MakeAdapter:
    """Factory (name, `write_adapter`'s options) -> a plain PEFT directory in `adapters/`."""

    def make(name: str, **options: Any) -> Path:
        return write_adapter(tmp_path / "adapters" / name, **options)

    return make


@pytest.fixture
def seal_adapter(tmp_path: Path, base: Path) -> SealAdapter:
    """Factory (name, base=..., template=..., kind=...) -> an artifact in `artifacts/`, made for the base."""

    def seal(name: str, *, made_for: Path = base, template: str | None = None, kind: str = "adapter") -> Artifact:
        with artifact.draft(tmp_path / "artifacts") as work:
            if kind == "adapter":
                write_adapter(work, config={"revision": name})
            else:
                write_base(work, seed=len(name))
            return artifact.seal(work, manifest(name, made_for, template, kind))

    return seal


@pytest.fixture
def facts(base: Path) -> BaseModel:
    return preflight.read_base(ModelSource("the-base", "", base))


@pytest.fixture
def check(facts: BaseModel) -> Check:
    """(path, limits) -> the checked adapter."""
    return lambda path, limits=LIMITS: preflight.check(path, facts, limits)


@pytest.fixture
def refusal(check: Check) -> Refusal:
    """(path, limits) -> the error that refused it."""

    def refuse(path: Path, limits: Limits = LIMITS) -> PreflightError:
        with pytest.raises(PreflightError) as caught:
            check(path, limits)
        assert caught.value.hint
        return caught.value

    return refuse


@contextmanager
def unreadable(folder: Path) -> Iterator[None]:
    """Nobody may read `folder` in the block; root, who may read everything, is somebody else for that long."""
    folder.chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


def write_base(path: Path, seed: int) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    shapes = {f"model.layers.{n}.{module}": shape for n in range(LAYERS) for module, shape in SHAPES.items()}
    shapes |= {"model.embed_tokens": (VOCABULARY, HIDDEN), "lm_head": (VOCABULARY, HIDDEN), "model.norm": (HIDDEN,)}
    weights = {f"{name}.weight": draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(weights, path / "model.safetensors")
    (path / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLM"], "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY})
    )
    (path / "tokenizer.json").write_text("{}")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    return path


def write_adapter(
    path: Path,
    *,
    rank: int = 4,
    modules: Sequence[str] = ("self_attn.q_proj", "self_attn.v_proj"),
    config: Mapping[str, Any] | None = None,
    change: Callable[[dict[str, np.ndarray]], object] = lambda _tensors: None,
) -> Path:
    """A PEFT directory with random values; `config` is laid over its settings, `change` edits its tensors in place."""
    path.mkdir(parents=True, exist_ok=True)
    targets = [module.rpartition(".")[2] for module in modules]
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": targets}
    (path / "adapter_config.json").write_text(json.dumps({**settings, **(config or {})}))
    draw, tensors = np.random.default_rng(0), {}
    for layer in range(LAYERS):
        for module in modules:
            rows, columns = SHAPES[module]
            key = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{key}.lora_A.weight"] = draw.normal(size=(rank, columns)).astype(np.float32)
            tensors[f"{key}.lora_B.weight"] = draw.normal(size=(rows, rank)).astype(np.float32)
    change(tensors)
    save_file(tensors, path / "adapter_model.safetensors")
    return path


def manifest(name: str, made_for: Path, template: str | None, kind: str) -> Manifest:
    text = checkpoint.chat_template(made_for) if template is None else template
    return Manifest(
        kind=kind,
        input_id="0" * 64,
        name=name,
        base=checkpoint.identify(made_for, "the-base", "main"),
        quantization=QuantizationRecord(method="none", double=False, compute_dtype="float32"),
        lora=LoraRecord(rank=4, alpha=8, scaling=2, rslora=False, target_modules=("q_proj", "v_proj")),
        template=TemplateRecord(text=text, sha256=sha256_text(text), source="model"),
        end_token_ids=(2,),
        tokenizer_sha256=checkpoint.tokenizer_sha256(made_for),
    )


class ScriptedEngine:
    """Loads and unloads as SGLang 0.5.17 does; `faults` says how a path fails instead: a status, "hang" or "drop"."""

    def __init__(self) -> None:
        self.adapters: set[str] = set()
        self.faults: dict[str, int | str] = {}
        self.asked: list[str] = []
        self.released = asyncio.Event()
        """Whatever hangs goes on."""

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.asked.append(request.path)
        fault = self.faults.get(request.path)
        if fault == "hang":
            await self.released.wait()
        if fault == "drop":
            request.transport.abort()
        if isinstance(fault, int):
            return web.json_response({"error_message": "as it was told"}, status=fault)
        name = body.get("lora_name") or body["lora_path"]
        if request.path == LOAD:
            self.adapters.add(name)
        elif name not in self.adapters:
            return web.json_response({"error_message": f"{name} is not loaded"}, status=400)
        elif request.path == UNLOAD:
            self.adapters.remove(name)
        return web.json_response({})


class World:
    """A deployer and all that it writes to."""

    def __init__(self, folder: Path, facts: BaseModel, registry: Registry, upstream: Upstream) -> None:
        self.engine = ScriptedEngine()
        self.registry, self.copies = registry, folder / "copies"
        self.routes, self.metrics = Routes(SERVED_BASE._replace(path=facts.path)), Metrics(Live)
        self.supervisor = Supervisor(lambda: pytest.fail("nothing starts here"), folder / "log", upstream, Patience())
        self.verdict: asyncio.Future[str] | str | TuneshipError = "passed"
        self._facts = facts
        books = Books(registry, AdapterStore(self.copies), self.routes, self.metrics, Slots(4))
        self.deployer = Deployer(books, Engine(self.supervisor, upstream), self, self.verify)  # type: ignore[arg-type]

    def phase(self, phase: Phase) -> None:
        self.supervisor.phase = phase
        (self.supervisor._ready.set if phase is Phase.READY else self.supervisor._ready.clear)()

    def start(self) -> None:
        """As the checker's."""

    async def check(self, path: Path) -> CheckedAdapter:
        return preflight.fits(path, self._facts)

    async def sound(self, checked: CheckedAdapter, copy: Path) -> tuple[str, ...]:
        return await asyncio.to_thread(preflight.sound, checked, copy, self._facts)

    async def prove(self, checked: CheckedAdapter, copy: Path) -> None:
        await asyncio.to_thread(preflight.prove, checked, copy)

    async def verify(self, _: Version, __: Path, ___: asyncio.Event) -> str:
        if isinstance(self.verdict, TuneshipError):
            raise self.verdict
        return self.verdict if isinstance(self.verdict, str) else await self.verdict

    def states(self) -> dict[str, State]:
        return {version.name: version.state for version in self.registry.versions()}

    def agree(self) -> None:
        """Registry, door, files and engine tell the same."""
        here = [version for version in self.registry.versions() if version.state is not State.UNLOADED]
        assert self.engine.adapters == {version.selector for version in here}
        assert set(self.copies.glob("*")) == {version.path for version in here}
        for version in self.registry.versions():
            lease = self.routes.lease(version.name)
            assert (lease is not None) == (version in here)
            if lease:
                lease.release()
        live = {version.alias for version in here if version.state is State.LIVE}
        assert {entry.name for entry in self.routes.entries} == {SERVED_BASE.name, *live}


@pytest.fixture
async def world(tmp_path: Path, facts: BaseModel) -> AsyncIterator[World]:
    with Registry.open(tmp_path / "registry.sqlite", "b", "the-base") as registry:
        async with Upstream() as upstream:
            made = World(tmp_path, facts, registry, upstream)
            app = web.Application()
            app.router.add_post("/{path:.*}", made.engine.handle)
            async with answering(app, handler_cancellation=True, shutdown_timeout=0.1) as url:
                upstream.open(url)
                made.phase(Phase.READY)
                yield made


@pytest.fixture
def adapters(make_adapter) -> list[Path]:
    """Three different ones."""
    return [make_adapter(name, config={"revision": name}) for name in ("one", "two", "three")]
