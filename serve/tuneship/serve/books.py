"""What those who change a server write to and ask: its books, and its engine."""

from __future__ import annotations

from typing import NamedTuple

from tuneship.serve.metrics import Metrics
from tuneship.serve.registry import Registry
from tuneship.serve.routes import Routes
from tuneship.serve.slots import Slots
from tuneship.serve.store import AdapterStore
from tuneship.serve.supervisor import Supervisor
from tuneship.serve.upstream import Upstream


class Engine(NamedTuple):
    """The engine, as far as adapters come and go."""

    supervisor: Supervisor
    upstream: Upstream


class Books(NamedTuple):
    """Where it is written what shall be served, where its files lie, and what the door reads."""

    registry: Registry
    store: AdapterStore
    routes: Routes
    metrics: Metrics
    slots: Slots
