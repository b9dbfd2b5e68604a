"""The serve stage of `tuneship up`."""

from __future__ import annotations

from pathlib import Path

from tuneship.core import checkpoint, model_source
from tuneship.core.stage import Job
from tuneship.serve import catalog, quantized, server
from tuneship.serve.dressed import Dress
from tuneship.serve.keys import Keyring

_LOG = "engine.log"


def serve(job: Job) -> Path:
    """Serve `inputs["model"]` (and `inputs["adapters"]`) until SIGTERM; `inputs["endpoint"]` is there meanwhile."""
    recipe = job.recipe
    settings = recipe.serve.model_copy(update={"port": int(job.inputs["port"])})
    adapters = Path(job.inputs["adapters"]) if job.inputs["adapters"] else None
    model = quantized.with_quantization(job.inputs["model"], settings, double=recipe.quantization.double)
    dress = _dress(job, model, with_adapters=bool(adapters))
    found = catalog.read(model, adapters, max_rank=settings.max_rank, name=job.inputs["name"], dress=dress)
    # Its own clients are on this machine: no keys but those that the environment demands.
    keyring = Keyring(job.attempt / "keys.toml")
    files = server.Files(job.attempt / _LOG, Path(job.inputs["endpoint"]))
    try:
        server.run(found, settings, files, server.Access(keyring))
    finally:
        if dress:
            dress.take_off()
    return job.attempt


def _dress(job: Job, model: str, *, with_adapters: bool) -> Dress | None:
    """The recipe's template, for a base that has none, or whose adapters were trained with that one."""
    template = job.recipe.data.template
    if not template or (not with_adapters and checkpoint.chat_template(model_source.resolve(model).path)):
        return None
    return Dress(template, job.attempt / _LOG)
