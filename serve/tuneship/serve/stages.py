"""The serve stage of `tuneship up`."""

from __future__ import annotations

from pathlib import Path

from tuneship.core import checkpoint, model_source
from tuneship.core.stage import Job
from tuneship.serve import catalog, quantized, server
from tuneship.serve.dressed import dress
from tuneship.serve.keys import Keyring


def serve(job: Job) -> Path:
    """Serve `inputs["model"]` (and `inputs["adapters"]`) until SIGTERM; `inputs["endpoint"]` is there meanwhile."""
    recipe = job.recipe
    settings = recipe.serve.model_copy(update={"port": int(job.inputs["port"])})
    adapters = [Path(job.inputs["adapters"])] if job.inputs["adapters"] else []
    catalog.check_names(job.inputs["model"], *adapters, name=job.inputs["name"])
    model = quantized.with_quantization(job.inputs["model"], settings, double=recipe.quantization.double)
    # Its own clients are on this machine: no keys but those that the environment demands.
    keyring = Keyring(job.attempt / "keys.toml")
    files = server.Files(job.attempt / "engine.log", Path(job.inputs["endpoint"]))
    with dress(_template(job, model, with_adapters=bool(adapters)), files.log) as dressed:
        found = catalog.read(model, *adapters, max_rank=settings.max_rank, name=job.inputs["name"], dress=dressed)
        server.run(found, settings, files, server.Access(keyring, invite=False))
    return job.attempt


def _template(job: Job, model: str, *, with_adapters: bool) -> str:
    """The recipe's, for a base that has none, or whose adapters were trained with that one; else empty."""
    template = job.recipe.data.template
    if not template or (not with_adapters and checkpoint.chat_template(model_source.resolve(model).path)):
        return ""
    return template
