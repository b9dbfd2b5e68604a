"""Can this adapter be served on this base? Answered from files alone, before any engine is started.

    base = read_base(source)
    checked = check(Path("adapters/sql"), base, Limits(max_rank=64))
    checked.path      # what SGLang is given: the directory, or a sealed copy of it in SGLang's words

    checked = fits(path, base, limits)            # in little time: an engine may load a copy of it
    remarks = sound(checked, copy, base, limits)  # of the copy: the engine may be asked
    prove(checked, copy)                          # it is what was checked: it may answer others

SGLang finds out late: a wrong shape ends the whole server at the first request, and what it does not know (rsLoRA, rank
and alpha patterns, saved modules) it ignores and answers wrongly. So all of that is refused here, by name, with what to
do about it. All that is wrong with an adapter is said at once. Adapters come from anywhere; one of ours has a manifest,
which is believed before its file names are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tuneship.core import artifact, checkpoint, servable
from tuneship.core.artifact import Artifact, FileRecord
from tuneship.core.errors import ArtifactError, PreflightError, TuneshipError
from tuneship.core.files import sha256_file
from tuneship.core.quoting import on_one_line, quoted
from tuneship.core.servable import MERGE, PROJECTIONS, Layer, Reason
from tuneship.serve import tensors
from tuneship.serve.preflight import files, folding, named, settings, tokenizer, weights
from tuneship.serve.preflight.base import BaseModel, read_base
from tuneship.serve.preflight.checked import CheckedAdapter
from tuneship.serve.preflight.files import deeper
from tuneship.serve.preflight.proof import prove
from tuneship.serve.tensors import Contents

__all__ = [
    "PROJECTIONS",
    "BaseModel",
    "CheckedAdapter",
    "Limits",
    "check",
    "deeper",
    "fits",
    "is_adapter",
    "prove",
    "read_base",
    "sound",
]


class Limits(NamedTuple):
    """What is fixed for all adapters when a server starts."""

    max_rank: int = 64
    target_modules: tuple[str, ...] = PROJECTIONS


def is_adapter(path: Path) -> bool:
    """Whether the directory at `path` wants to be an adapter; hidden ones are somebody's work in progress."""
    if path.name.startswith(".") or not path.is_dir():
        return False
    if artifact.is_artifact(path):
        return artifact.read_manifest(path).kind == "adapter"
    return (path / files.CONFIG).is_file() or any(path.glob("adapter_model*"))


def check(path: Path, base: BaseModel, limits: Limits = Limits()) -> CheckedAdapter:  # noqa: B008 - it is immutable
    """Hold the adapter at `path` against `base` and the server's limits.

    Raises:
        ArtifactError: it was changed, is cut short, or was trained on another base.
        PreflightError: it is whole, and cannot be served here.

    """
    opened = artifact.open_artifact(path, kind="adapter", verify=False) if artifact.is_artifact(path) else None
    found = None if opened else files.find(path)
    # Hashed and read in one: whoever changes the files from now on has not changed what was checked.
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(tensors.read, path / files.WEIGHTS)
        if opened:
            _verify(opened, reading)
        return _judge(path, opened, found, reading.result, base, limits)


def fits(path: Path, base: BaseModel, limits: Limits = Limits()) -> CheckedAdapter:  # noqa: B008 - as above
    """`check` without what takes long: an engine may load a copy of it, and nobody may ask that before it is `sound`.

    Not looked at are the values, and whether an artifact is still what was sealed. What turns out to be wrong, or has
    to be folded, is checked in full, so that all that is wrong is said, and in `check`'s words.

    Raises:
        ArtifactError, PreflightError: as `check`.

    """
    try:
        opened = artifact.open_artifact(path, kind="adapter", verify=False) if artifact.is_artifact(path) else None
        found = files.find(path)
        if opened:  # its manifest names it, until its bytes do
            vouched = artifact.content_id(opened.manifest.files) == opened.manifest.content_id
            contents = Contents(0, "", tensors.headers(found.weights), {})
        else:
            vouched = True
            contents = tensors.digest(found.weights)  # its name is made of what is in it
        if vouched and not _is_folded(path, settings.read(found.config), base, limits):
            return _judge(path, opened, found, lambda: contents, base, limits)
    except TuneshipError:
        pass
    return check(path, base, limits)


def sound(
    checked: CheckedAdapter,
    copy: Path,
    base: BaseModel,
    limits: Limits = Limits(),  # noqa: B008 - as above
) -> tuple[str, ...]:
    """Make sure that the engine may be asked what is in `copy`, by what is in it alone; what is to be remarked.

    Raises:
        ArtifactError: what was checked was damaged, or it was changed since.
        PreflightError: its values are no numbers.

    """
    try:
        config = settings.read(copy / files.CONFIG)
        judged = weights.check(tensors.look(copy / files.WEIGHTS), config, base, limits.target_modules)
    except (ArtifactError, OSError):
        prove(checked, copy)  # of something else that is said
        raise
    reasons = [*servable.unserved(config), *_rank(config, judged.layers, limits), *judged.reasons]
    if reasons:
        prove(checked, copy)
        raise _refusal(checked.name, reasons)
    return tuple(dict.fromkeys((*checked.remarks, *_remarks(checked.name, judged))))


def _judge(
    path: Path,
    opened: Artifact | None,
    found: files.Files | None,
    read: Callable[[], Contents],
    base: BaseModel,
    limits: Limits,
) -> CheckedAdapter:
    """Everything but whether the bytes are those that were sealed; `read` says what is in the weights."""
    if opened:
        artifact.check_base(opened, base.record.weights_sha256, base.record.id)
    name = (opened.manifest.name if opened else "") or path.name
    found = found or files.find(path)
    written = _record(found.config)
    config = settings.read(found.config)
    contents = read()
    records = opened.manifest.files if opened else _records(written, contents)
    judged = weights.check(contents, config, base, limits.target_modules)
    reasons = [
        *found.reasons,
        *servable.unserved(config),
        *_rank(config, judged.layers, limits),
        *judged.reasons,
        *(_origin(opened, base) if opened else [*tokenizer.check(path, base.path), *named.check(config, base)]),
    ]
    if reasons:
        raise _refusal(name, reasons)
    return CheckedAdapter(
        name=name,
        content_id=opened.manifest.content_id if opened else artifact.content_id(records),
        path=_served(path, found, records, config, judged.layers, base, limits),
        remarks=(*_remarks(name, judged), *(() if opened else named.remarks(name, config, base))),
    )


def _verify(opened: Artifact, reading: Future[Contents]) -> None:
    """Check every byte of it. What cannot be read as tensors has mostly been changed, and that is said first."""

    def sha256(file: Path) -> str:
        known = file == opened.path / files.WEIGHTS and not reading.exception()
        return reading.result().sha256 if known else sha256_file(file)

    artifact.verify_payload(opened, sha256)


def _origin(opened: Artifact, base: BaseModel) -> list[Reason]:
    """The manifest says which text it was trained on."""
    manifest, reasons = opened.manifest, []
    if manifest.template.sha256 != base.template_sha256:
        own = opened.path / checkpoint.TEMPLATE_FILE
        fix = f"serve the base with --template {own}, or {MERGE}" if own.is_file() else MERGE
        reasons.append(Reason(f"was trained with another chat template than {base.record.id} has", fix))
    if manifest.tokenizer_sha256 != base.tokenizer_sha256:
        reasons.append(
            Reason(
                f"was trained with another tokenizer than {base.record.id} has",
                f"use the base {manifest.base.id} at revision {manifest.base.revision}",
            )
        )
    return reasons


def _rank(config: Mapping[str, Any], layers: Mapping[str, Layer], limits: Limits) -> list[Reason]:
    rank = max((layer.rank for layer in layers.values()), default=config["r"])
    if rank <= limits.max_rank:
        return []
    fact = f"has rank {rank}, the server takes at most {limits.max_rank}"
    return [Reason(fact, f"restart with --max-rank {rank}")]


def _remarks(name: str, judged: weights.Weights) -> tuple[str, ...]:
    return (f"adapter {quoted(name)} changes nothing: its answers are the base's",) if judged.silent else ()


def _refusal(name: str, reasons: list[Reason]) -> PreflightError:
    name = quoted(name)
    facts = dict.fromkeys(on_one_line(reason.fact) for reason in reasons)
    fixes = dict.fromkeys(on_one_line(reason.fix) for reason in reasons)
    if len(facts) == 1:
        return PreflightError(f"adapter {name} {next(iter(facts))}", hint="\n      ".join(fixes))
    listed = "".join(f"\n  - {fact}" for fact in facts)
    return PreflightError(
        f"adapter {name} cannot be served, for {len(facts)} reasons. It{listed}", hint="\n      ".join(fixes)
    )


def _record(file: Path) -> FileRecord:
    return FileRecord(size=file.stat().st_size, sha256=sha256_file(file))


def _records(config: FileRecord, contents: Contents) -> dict[str, FileRecord]:
    """The two files that answer, whose records are an adapter's identity; what else lies there may come and go."""
    return {files.CONFIG: config, files.WEIGHTS: FileRecord(size=contents.size, sha256=contents.sha256)}


def _served(
    path: Path,
    found: files.Files,
    records: Mapping[str, FileRecord],
    config: dict[str, Any],
    layers: Mapping[str, Layer],
    base: BaseModel,
    limits: Limits,
) -> Path:
    """The directory itself, if SGLang reads it as PEFT does; else the copy in its words."""
    if _is_folded(path, config, base, limits):
        return folding.copy(found.weights, records[files.WEIGHTS].sha256, servable.fold(config, layers), layers)
    return path.resolve()


def _is_folded(path: Path, config: Mapping[str, Any], base: BaseModel, limits: Limits) -> bool:
    # SGLang refuses tokens beyond the embedding, also those that the base's own tokenizer lists (Gemma 3).
    beyond = any(number >= base.vocab_size for number in tokenizer.added_tokens(path).values())
    return beyond or servable.needs_folding(config, limits.target_modules)
