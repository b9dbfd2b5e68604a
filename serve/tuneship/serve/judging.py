"""Versions held against their evidence before they answer: by what, under what, and again when that has changed.

    Registry.open(..., under=under(catalog, serve, machine))   # in words: "weights nf4, bfloat16, template 5d8c..."
    judge = judge(serve, catalog, engine, books, kept, dtype)
    await again(registry, kept, judge, folder, sources)        # of a server that was started otherwise before

`passed` is true of a version in one server: the same adapter over a base that SGLang quantizes while it loads, in
another type, or under a template that was changed since is another model, or may be.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from tuneship.core import checkpoint
from tuneship.core.artifact import EVIDENCE, is_artifact
from tuneship.core.errors import ParityError
from tuneship.core.files import sha256_text
from tuneship.core.hardware import Hardware
from tuneship.core.progress import say
from tuneship.core.recipe import Serve
from tuneship.serve import quantized
from tuneship.serve.books import Books, Engine
from tuneship.serve.catalog import Catalog
from tuneship.serve.deploy import Verify
from tuneship.serve.kept_evidence import KeptEvidence, files_of
from tuneship.serve.launch import pick_dtype
from tuneship.serve.registry import SERVED, Registry, Version
from tuneship.serve.state import way_out
from tuneship.serve.upstream import Upstream
from tuneship.serve.verify import Memory, Outcome, Verdict, read_deferred, read_evidence, verify, verify_merged
from tuneship.serve.verify.engine import EngineScorer

_NOT_ASKED = "not asked"


def under(catalog: Catalog, serve: Serve, machine: Hardware) -> str:
    """What a verification depends on beside the adapter and the base's weights, in words."""
    if not serve.verify:
        return _NOT_ASKED
    method = quantized.method(serve, catalog.weights, machine)
    try:
        sglang = metadata.version("sglang")
    except metadata.PackageNotFoundError:  # it will not start
        sglang = "none"
    parts = (
        f"weights {catalog.weights if method == 'none' else method}",
        pick_dtype(serve.dtype),
        f"template {sha256_text(checkpoint.chat_template(catalog.model_path))[:12]}",
        f"tokenizer {checkpoint.tokenizer_sha256(catalog.model_path)[:12]}",
        f"SGLang {sglang}",
        *serve.extra_args,
    )
    return ", ".join(parts)


async def again(
    registry: Registry, kept: KeptEvidence, verify_one: Verify, folder: Path, sources: Mapping[str, Path]
) -> None:
    """Judge the versions of an earlier server that was another than this one, before they answer.

    The evidence is what that server kept; of one that kept none it is that of `sources`, {version: directory}, if this
    one was given it again.

    Raises:
        ParityError: one of them is another model here.

    """
    loaded = asyncio.Event()
    loaded.set()
    for version in registry.verified_otherwise():
        source = kept.of(version)
        source = source if source.is_dir() else sources.get(version.name, source)
        before = f"{version.verified!r} ({version.verified_under or 'under what is not on record'})"
        try:
            verified = await verify_one(version, source, loaded)
        except ParityError as error:
            raise ParityError(
                f"{version.name}, {before} in the server before, is another model in this one: {error.message}",
                hint=f"serve it as it was, or take it out: {way_out(version.name, folder)}",
            ) from None
        if version.verified == "passed" and not source.is_dir() and verified != _NOT_ASKED:
            say(f"warning: {version.name} was {before}, and its evidence is gone: load it again to have it verified")
        registry.verified(version.name, verified, "start")


def judge(serve: Serve, catalog: Catalog, engine: Engine, books: Books, kept: KeptEvidence, dtype: str) -> Verify:
    """How a version is held against the evidence that it came with, which is kept."""
    registry = books.registry
    memory = Memory(lambda: engine.supervisor.engine)

    async def judged(version: Version, source: Path, loaded: asyncio.Event) -> str:
        # Found here, not there: until a thread has its turn, another version may have come.
        strangers = kept.strangers({present.path.name for present in registry.present()})
        files = await asyncio.to_thread(files_of, source)
        comparing = asyncio.create_task(compare(version, source, loaded))
        try:
            await asyncio.to_thread(kept.keep, version, source, files, strangers)
            return await comparing
        finally:  # or it would ask for what is being unloaded
            comparing.cancel()
            await asyncio.gather(comparing, return_exceptions=True)

    async def compare(version: Version, source: Path, loaded: asyncio.Event) -> str:
        if not serve.verify:
            return _NOT_ASKED
        scorer = EngineScorer(engine.upstream, catalog.base, loaded, books.routes.all_in_flight)
        others = {v.name: v.selector for v in registry.present() if v.state in SERVED and v.name != version.name}
        reference = await asyncio.to_thread(read_evidence, source / EVIDENCE)
        # What SGLang quantizes while it loads has other bits than lie on the disk.
        same_bits = serve.quantization != "fp8" and quantized.same_bits(source, catalog.base.path, dtype)
        own_base = is_artifact(source)  # else nobody says of which base it is; preflight compared the hashes
        verdict = await verify(
            scorer, version.selector, reference, others=others, same_bits=same_bits, own_base=own_base, memory=memory
        )
        return _judged(version.name, verdict)

    return judged


async def prove_merged(upstream: Upstream, catalog: Catalog, serve: Serve) -> None:
    """Hold a merged model against what merging measured, if it did, before it answers anybody.

    Raises:
        ParityError: it is another model.
        EngineError: the engine does not score.

    """
    reference = read_evidence(catalog.base.path / EVIDENCE) if serve.verify and catalog.mode == "merged" else []
    if not reference:
        return
    float32 = serve.dtype == "float32" and all(row.dtype == "float32" for row in reference)
    left = read_deferred(catalog.base.path / EVIDENCE)
    verdict = await verify_merged(EngineScorer(upstream, catalog.base), reference, float32=float32, left=left)
    _judged(catalog.base.version, verdict)


def _judged(version: str, verdict: Verdict) -> str:
    verdict.require()
    if verdict.outcome is Outcome.CANNOT_TELL:
        say(f"warning: {version}: {verdict.message}")
    elif verdict.passed:
        say(f"{version}: {verdict.message}")
    return verdict.verified
