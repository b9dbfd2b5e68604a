"""The merge stage as `tuneship up` runs it, in a process of its own: candidates, parity, a sealed checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from tuneship.core import artifact as artifacts
from tuneship.core import base_store, checkpoint, recipe_file
from tuneship.core.artifact import Artifact
from tuneship.core.files import write_atomic
from tuneship.core.parity import REFERENCE_FILE, Deferred, Parity, ReferenceRow, read_reference, write_reference
from tuneship.core.progress import say
from tuneship.core.recipe import Recipe
from tuneship.core.stage import Job
from tuneship.train import base as packed
from tuneship.train import parity, prepare
from tuneship.train.elsewhere import compress
from tuneship.train.merging import candidates, merge, skeleton
from tuneship.train.merging.candidates import Kept, Text
from tuneship.train.merging.merge import Onto, Trained
from tuneship.train.parity import Comparison
from tuneship.train.prepare import Prepared


def merge_adapter(job: Job) -> Path:
    """An adapter artifact -> a merged checkpoint whose parity was measured from disk, or left to `verify` by name."""
    recipe = job.recipe
    adapter = artifacts.open_artifact(Path(job.inputs["adapter"]), kind="adapter")
    prepared = prepare.prepare(recipe)
    base = checkpoint.identify(prepared.source.path, prepared.source.id, prepared.source.revision)
    artifacts.check_base(adapter, base.weights_sha256, base.id)
    has_reference = (adapter.evidence / REFERENCE_FILE).exists()
    reference = list(read_reference(adapter.evidence)) if has_reference else []
    with artifacts.draft(job.run.artifacts) as work:
        text = Text(prepared.tokenizer, adapter.manifest.end_token_ids, prepared.pad_id)
        trained = _trained(prepared, adapter)
        kept = candidates.make(recipe, trained, prepared.source.path, text, reference, work)
        metrics = _prove(job, adapter, kept, reference, work / artifacts.EVIDENCE)
        if recipe.merge.quantize != "none":
            metrics |= _compress(job, prepared, adapter, trained, kept.onto, [] if kept.deferred else reference, work)
        manifest = adapter.manifest.model_copy(
            update={
                "kind": "merged",
                "input_id": job.input_id,
                "parents": (adapter.manifest.content_id,),
                "recipe_digest": recipe_file.digest(recipe, "merge"),
                "metrics": metrics or adapter.manifest.metrics,
            }
        )
        return artifacts.seal(work, manifest).path


def _trained(prepared: Prepared, adapter: Artifact) -> Trained:
    """A base that is packed on disk was packed from the dtype that all such are written in."""
    quantization = adapter.manifest.quantization
    on_disk = artifacts.quantized_base(prepared.source.path)
    dtype = packed.DTYPE if on_disk else quantization.compute_dtype
    return Trained(
        base=base_store.original(prepared.source).path,
        adapter=adapter.path,
        kind=quantization.method,
        dtype=getattr(torch, dtype),
        double=quantization.double,
    )


def _prove(job: Job, adapter: Artifact, kept: Kept, reference: list[ReferenceRow], evidence: Path) -> dict[str, float]:
    """Keep what was measured as evidence, and refuse what is worse than the limit; the merged model's metrics."""
    recipe = job.recipe
    limit = recipe.merge.max_nll_increase
    if kept.deferred:
        say(f"parity is left to verify: {kept.deferred}")
        write_reference(evidence, reference)
        left = Deferred(merged_into=kept.onto, reason=kept.deferred, limit=limit)
        write_atomic(evidence / "deferred-1.json", left.model_dump_json(indent=1, by_alias=True))
        return {}
    if not kept.measured:
        say("no held-out data: parity of the merged checkpoint is not measured")
        return {}
    verdict = merge.require(kept.judge(_reference(job, adapter), len(reference), limit), force=job.force)
    others = [f"{nll:.4f} merged into the {onto} base" for onto, nll in kept.nlls.items() if onto != kept.onto]
    say(
        f"parity over {verdict.tokens} held-out tokens: NLL {verdict.nll_reference:.4f} trained, "
        f"{verdict.nll:.4f} merged into the {kept.onto} base ({verdict.nll_increase:+.4f} nats/token), "
        f"KL {verdict.kl_mean:.4f}" + "".join(f"; not kept: {other}" for other in others)
    )
    return _record(evidence / "parity-1.json", verdict, reference, kept.measured[kept.onto])


def _compress(
    job: Job,
    prepared: Prepared,
    adapter: Artifact,
    trained: Trained,
    onto: Onto,
    reference: list[ReferenceRow],
    work: Path,
) -> dict[str, float]:
    """Put fewer bits in the place of the 16-bit weights in `work`, with a parity of their own; its metrics."""
    recipe, scheme = job.recipe, job.recipe.merge.quantize
    assert scheme != "none"
    say(f"compressing to {scheme}")
    ids = _calibration(recipe, prepared, job.attempt) if scheme == "w4a16" else []
    names = skeleton.read(trained.base, recipe.model)
    metrics: dict[str, float] = {}
    with artifacts.draft(job.run.artifacts) as scratch:
        made = compress.compress(work, scheme, names, ids, scratch, job.attempt / "llm-compressor.log")
        if reference:
            folders = {str(scheme): made}
            found = candidates.measure(recipe, trained, prepared.source.path, folders, reference, prepared.pad_id)
            verdict = parity.judge(
                found[scheme],
                len(reference),
                reference=_reference(job, adapter),
                candidate=f"merged ({onto}), {scheme}",
                limit=recipe.merge.max_nll_increase,
            )
            verdict = merge.require(verdict.model_copy(update={"merged_into": onto}), force=job.force)
            say(f"as {scheme}: NLL {verdict.nll:.4f} ({verdict.nll_increase:+.4f}), KL {verdict.kl_mean:.4f}")
            metrics = _record(work / artifacts.EVIDENCE / "parity-2.json", verdict, reference, found[scheme])
        compress.replace_weights(work, made)
    return metrics


def _calibration(recipe: Recipe, prepared: Prepared, folder: Path) -> list[list[int]]:
    rows = prepare.read_rows(recipe, prepared.template, folder).train.rows
    return [row.input_ids for row in rows[: compress.CALIBRATION_ROWS]]


def _reference(job: Job, adapter: Artifact) -> str:
    return f"{adapter.version} on {job.recipe.quantization.method} base"


def _record(file: Path, verdict: Parity, reference: list[ReferenceRow], measured: Comparison) -> dict[str, float]:
    """Keep it as evidence, and return it as metrics; `verify` replays what was measured last."""
    write_reference(file.parent, merge.with_merged(reference, measured.merged))
    write_atomic(file, verdict.model_dump_json(indent=1, by_alias=True))
    return {"nll_reference": verdict.nll_reference, "nll": verdict.nll, "kl_mean": verdict.kl_mean}
