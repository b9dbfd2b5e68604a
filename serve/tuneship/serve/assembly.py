"""The parts of one server, put together: who knows whom, in one place."""

from __future__ import annotations

import shutil
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tuneship.core.errors import EngineError, TuneshipError
from tuneship.core.hardware import Hardware
from tuneship.core.progress import say
from tuneship.core.recipe import Serve
from tuneship.serve import engine as engines
from tuneship.serve import judging, kept_evidence, packed, quantized, scratch
from tuneship.serve import state as states
from tuneship.serve.books import Books, Engine
from tuneship.serve.catalog import Catalog
from tuneship.serve.deploy import Deployer
from tuneship.serve.kept_evidence import KeptEvidence
from tuneship.serve.launch import EngineConfig, LoadedAdapter, configure, pick_dtype
from tuneship.serve.metrics import Live, Metrics
from tuneship.serve.preflight import Limits
from tuneship.serve.preflight.apart import Checker
from tuneship.serve.registry import Registry, Version
from tuneship.serve.registry.records import COPIES
from tuneship.serve.routes import Routes
from tuneship.serve.slots import Pressure, Slots
from tuneship.serve.store import AdapterStore
from tuneship.serve.supervisor import Patience, Phase, Supervisor
from tuneship.serve.upstream import Upstream


class Parts(NamedTuple):
    """One server. `deployer` and `registry` are there where adapters can come and go."""

    routes: Routes
    metrics: Metrics
    upstream: Upstream
    supervisor: Supervisor
    live: Callable[[], Live]
    deployer: Deployer | None = None
    registry: Registry | None = None
    verify_again: Callable[[], Awaitable[None]] | None = None
    """Whatever was verified under something else than this server is; ParityError where it is another model here."""
    explained: Callable[[TuneshipError], TuneshipError] = lambda error: error
    """Why the server ends, with the version that it ends for, if it is one that an earlier server left."""

    def status(self) -> dict[str, Any]:
        """What `GET /admin/status` says."""
        supervisor, versions = self.supervisor, self.registry.versions() if self.registry else []
        live = self.live()
        return {
            "engine": {
                "state": supervisor.phase.value,
                "pid": supervisor.engine.process.pid if supervisor.engine else 0,
                "url": supervisor.engine.url if supervisor.engine else "",
                "restarts": supervisor.restarts,
                "up_s": supervisor.up_s,
                "last_failure": supervisor.last_failure,
            },
            "slots": {
                "total": live.slots_total,
                "wanted": live.slots_wanted,
                "misses_per_minute": live.slot_misses_per_minute,
                "thrashing": live.thrashing,
            },
            "in_flight": self.upstream.waiting,
            "versions": [describe(version, self.routes) for version in versions],
            "metrics": self.metrics.snapshot(),
        }


def describe(version: Version, routes: Routes) -> dict[str, Any]:
    """A version as JSON."""
    return {
        "alias": version.alias,
        "version": version.name,
        "state": version.state.value,
        "weight": version.weight,
        "pinned": version.pinned,
        "verified": version.verified,
        "changed_at": version.changed_at,
        "in_flight": routes.in_flight(version.name),
    }


@contextmanager
def assembled(catalog: Catalog, serve: Serve, machine: Hardware, log: Path, state: Path | None) -> Iterator[Parts]:
    """The parts of a server of `catalog`, nothing started yet.

    `state` is where versions and their files are kept; None: nothing outlives this server.

    Raises:
        RegistryError: `state` is another server's, of another base, or of a newer tuneship.
        PreflightError: it holds versions that cannot be served with these limits; or SGLang has no kernels for the
            base's packed weights.

    """
    upstream, patience = Upstream(), _patience(catalog, serve, machine)

    def supervised(versions: Callable[[], list[Version]]) -> Supervisor:
        config = partial(_configuration, catalog, serve, machine, versions)
        return Supervisor(config, log, upstream, patience)

    if catalog.mode != "adapters":
        routes, supervisor = Routes(catalog.base), supervised(list)
        live = partial(_live, supervisor, routes, None)
        metrics = Metrics(live)
        metrics.serving([catalog.base.version])
        yield Parts(routes, metrics, upstream, supervisor, live)
        return
    assert catalog.origin
    base_id = catalog.base.version.rpartition("@")[2]
    with (
        _state(state, log) as folder,
        Registry.open(
            folder / states.REGISTRY, base_id, catalog.base.base_id, judging.under(catalog, serve, machine)
        ) as registry,
    ):
        for event in registry.recovered:
            say(f"{event.version}: {event.detail}")
        limits = Limits(serve.max_rank)
        states.require(registry, limits, serve.max_loras, folder)
        store, kept = AdapterStore(folder / COPIES), KeptEvidence(folder / kept_evidence.FOLDER)
        store.sweep({version.path for version in registry.present()})
        kept.sweep({version.path.name for version in registry.present()})
        slots = Slots(serve.max_loras + 1)
        routes = Routes(
            catalog.base, registry.versions(), watch=lambda e: slots.asked(e.version if e.selector else None)
        )
        supervisor = supervised(lambda: deployer.restored())  # noqa: PLW0108 - it is made below
        live = partial(_live, supervisor, routes, slots)
        metrics = Metrics(live)
        books = Books(registry, store, routes, metrics, slots)
        checker = Checker(catalog.origin, limits)
        dtype = pick_dtype(serve.dtype)
        given = {entry.version: entry.source or entry.path for entry in catalog.entries[1:]}
        engine = Engine(supervisor, upstream)
        judge = judging.judge(serve, catalog, engine, books, kept, dtype)
        deployer = Deployer(books, engine, checker, judge)
        try:
            yield Parts(
                *(routes, metrics, upstream, supervisor, live, deployer, registry),
                verify_again=partial(judging.again, registry, kept, judge, folder, given),
                explained=partial(_explained, log, registry, folder) if state else lambda error: error,
            )
        finally:
            checker.stop()


def _patience(catalog: Catalog, serve: Serve, machine: Hardware) -> Patience:
    """How long the engine may take. Weights are looked at here, once, and not at each of its starts."""
    patience = Patience(hang_s=serve.hang_timeout_s, restarts=serve.restarts)
    asked = machine.gpus and catalog.weights == packed.METHOD  # without a GPU nothing of it is served
    matrices = packed.matrices(catalog.model_path) if asked else {}
    if not matrices:
        return patience
    if quantized.tensor_parallel(serve.extra_args) == "1":
        packed.require(matrices)
    say("SGLang compiles its kernels for packed weights when it first starts on a machine, which takes minutes")
    return patience._replace(start_s=packed.START_S)


def _configuration(
    catalog: Catalog, serve: Serve, machine: Hardware, versions: Callable[[], list[Version]]
) -> EngineConfig:
    """What the next engine is started with: another free port, and the adapters of that moment."""
    adapters = [LoadedAdapter(version.selector, version.path, version.pinned) for version in versions()]
    return configure(serve, catalog, machine, engines.free_port(), adapters)


def _live(supervisor: Supervisor, routes: Routes, slots: Slots | None) -> Live:
    pressure = slots.pressure() if slots else Pressure(0, 0)
    return Live(
        engine_up=supervisor.phase is Phase.READY,
        engine_restarts=supervisor.restarts,
        in_flight=routes.all_in_flight(),
        slots_total=pressure.total,
        slots_wanted=pressure.wanted,
        slot_misses_per_minute=pressure.misses_per_minute,
        thrashing=pressure.thrashing,
    )


def _explained(log: Path, registry: Registry, folder: Path, error: TuneshipError) -> TuneshipError:
    return states.blamed(error, log, registry, folder) if isinstance(error, EngineError) else error


@contextmanager
def _state(wanted: Path | None, log: Path) -> Iterator[Path]:
    """The directory of the server's registry, which makes it; beside the log, gone at its end, if none is wanted."""
    if wanted:
        yield wanted
        return
    folder = scratch.fresh(log, "state")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
