"""The serve stage of `tuneship up`."""

from __future__ import annotations

from pathlib import Path

from tuneship.core.stage import Job
from tuneship.serve import catalog, quantized, server


def serve(job: Job) -> Path:
    """Serve `inputs["model"]` (and `inputs["adapters"]`) until SIGTERM; `inputs["endpoint"]` is there meanwhile."""
    recipe = job.recipe
    settings = recipe.serve.model_copy(update={"port": int(job.inputs["port"])})
    adapters = Path(job.inputs["adapters"]) if job.inputs["adapters"] else None
    model = quantized.with_quantization(job.inputs["model"], settings, double=recipe.quantization.double)
    found = catalog.read(model, adapters, max_rank=settings.max_rank, name=job.inputs["name"])
    server.run(found, settings, server.Files(job.attempt / "engine.log", Path(job.inputs["endpoint"])))
    return job.attempt
