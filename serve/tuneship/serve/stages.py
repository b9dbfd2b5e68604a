"""The serve stage of `tuneship up`."""

from __future__ import annotations

from pathlib import Path

from tuneship.core.stage import Job
from tuneship.serve import catalog, quantized, server
from tuneship.serve.keys import Keyring


def serve(job: Job) -> Path:
    """Serve `inputs["model"]` (and `inputs["adapters"]`) until SIGTERM; `inputs["endpoint"]` is there meanwhile."""
    recipe = job.recipe
    settings = recipe.serve.model_copy(update={"port": int(job.inputs["port"])})
    adapters = Path(job.inputs["adapters"]) if job.inputs["adapters"] else None
    model = quantized.with_quantization(job.inputs["model"], settings, double=recipe.quantization.double)
    found = catalog.read(model, adapters, max_rank=settings.max_rank, name=job.inputs["name"])
    # Its own clients are on this machine: no keys but those that the environment demands.
    keyring = Keyring(job.attempt / "keys.toml")
    files = server.Files(job.attempt / "engine.log", Path(job.inputs["endpoint"]))
    server.run(found, settings, files, server.Access(keyring))
    return job.attempt
