"""The serve stage of `tuneship up`."""

from __future__ import annotations

from pathlib import Path

from tuneship.core.stage import Job
from tuneship.serve import catalog, server


def serve(job: Job) -> Path:
    """Serve `inputs["model"]` (and `inputs["adapters"]`) until SIGTERM; `inputs["endpoint"]` is there meanwhile."""
    settings = job.recipe.serve.model_copy(update={"port": int(job.inputs["port"])})
    adapters = Path(job.inputs["adapters"]) if job.inputs["adapters"] else None
    found = catalog.read(job.inputs["model"], adapters, max_rank=settings.max_rank, name=job.inputs["name"])
    server.run(found, settings, server.Files(job.attempt / "engine.log", Path(job.inputs["endpoint"])))
    return job.attempt
