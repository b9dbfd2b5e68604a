"""What one stage hands to the next: a directory that is whole, unchanged, and says where it comes from.

An artifact's directory is named `<kind>-<first 12 hex digits of its content id>`. It holds the files that the ecosystem
already knows (a PEFT adapter, a HF checkpoint), `artifact.json`, and `evidence/`. It is filled under a temporary name,
flushed, and renamed, so half an artifact can never be read. The content id covers the payload alone: evidence is
append-only and a later parity check does not rename a version.

    with draft(run.artifacts) as work:
        model.save_pretrained(work)
        artifact = seal(work, Manifest(kind="adapter", ...))

    artifact = open_artifact(path, kind="adapter")   # every byte checked
"""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from tuneship.core import versioned
from tuneship.core.errors import ArtifactError
from tuneship.core.files import read_up_to, sha256_file, sha256_listing, sync_directory, sync_tree, write_atomic
from tuneship.core.quoting import on_one_line
from tuneship.core.recipe import BUNDLED_PREFIX

SCHEMA = 1
MANIFEST = "artifact.json"
EVIDENCE = "evidence"
LARGEST_MANIFEST = 1 << 24
"""Bytes. A template is tens of KB, and each file of the payload has some 150 bytes."""
_HASHERS = 4
"""Files that are hashed at a time: one core hashes some 2 GB/s, a disk reads more."""

Kind = Literal["adapter", "merged", "base-nf4", "base-dequantized"]
_MAKER: dict[Kind, tuple[str, ...]] = {
    "adapter": ("tuneship", "train", "RECIPE"),
    "merged": ("tuneship", "up", "RECIPE", "--until", "merge"),
    "base-nf4": ("tuneship", "base", "build", "BASE"),
    "base-dequantized": ("tuneship", "base", "build", "BASE", "--quantization", "dequantized"),
}
"""What makes one that was damaged again, by its kind: each of them looks at the bytes of what is there."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class FileRecord(_Record):
    """One payload file."""

    size: int
    sha256: str


class Base(_Record):
    """The model that was trained on top of. `weights_sha256` is over the sorted weight files' own hashes."""

    id: str
    revision: str
    weights_sha256: str
    architecture: str


class QuantizationRecord(_Record):
    """How the frozen base is quantized: while an adapter was trained, or in a base on disk."""

    method: str
    double: bool
    compute_dtype: str
    """What the weights were cast to when they were loaded, before they were packed."""
    stored_dtype: str = ""
    """What they are in the checkpoint, by its config; empty: unknown."""


class LoraRecord(_Record):
    """The adapter's shape; `scaling` is what every module's delta is multiplied with."""

    rank: int
    alpha: float
    scaling: float
    rslora: bool
    target_modules: tuple[str, ...]
    effective_scaling_by_pattern: dict[str, float] = {}


class TemplateRecord(_Record):
    """The chat template that training rendered with. `source` is `model` or `recipe`."""

    text: str
    sha256: str
    source: str


class DataRecord(_Record):
    """What it was trained on; `tokens` and `loss_tokens` count one epoch."""

    train_sha256: str
    heldout_sha256: str
    rows: int
    tokens: int
    loss_tokens: int


class Manifest(_Record):
    """`artifact.json`. `seal` fills in `content_id`, `created_at` and `files`."""

    schema_: int = Field(default=SCHEMA, alias="schema")
    kind: Kind
    content_id: str = ""
    input_id: str
    created_at: str = ""
    name: str = ""
    """The recipe's name: the default alias under which this is served."""
    parents: tuple[str, ...] = ()
    base: Base
    quantization: QuantizationRecord
    lora: LoraRecord | None = None
    template: TemplateRecord
    end_token_ids: tuple[int, ...]
    tokenizer_sha256: str
    data: DataRecord | None = None
    recipe_digest: str = ""
    seeds: dict[str, int] = {}
    versions: dict[str, str] = {}
    hardware: dict[str, Any] = {}
    metrics: dict[str, float] = {}
    files: dict[str, FileRecord] = {}

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)


class Artifact(NamedTuple):
    """A checked artifact on disk."""

    path: Path
    manifest: Manifest

    @property
    def id12(self) -> str:
        """The first 12 hex digits of the content id: how the directory and the served version are named."""
        return self.manifest.content_id[:12]

    @property
    def version(self) -> str:
        """The immutable served name, such as `invoice-json@3fa9c1d20b77`."""
        return f"{self.manifest.name or self.manifest.kind}@{self.id12}"

    @property
    def evidence(self) -> Path:
        """Where parity results and reference log-probabilities lie."""
        return self.path / EVIDENCE


@contextmanager
def draft(folder: Path) -> Iterator[Path]:
    """A temporary directory in `folder` to fill and `seal`; gone if it was not sealed, also on Ctrl-C."""
    folder.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder, prefix=".draft-"))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def seal(work: Path, manifest: Manifest) -> Artifact:
    """Hash what lies in `work`, write its manifest, flush it, and rename it to its final name beside `work`.

    When the very same payload was sealed before, that artifact stays and gets the new evidence; a damaged one is
    replaced.
    """
    for path in work.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    files = hash_payload(work)
    identity = content_id(files)
    done = manifest.model_copy(
        update={"content_id": identity, "files": files, "created_at": datetime.now(UTC).isoformat(timespec="seconds")}
    )
    write_atomic(work / MANIFEST, done.model_dump_json(indent=1, by_alias=True))
    work.chmod(0o755)
    sync_tree(work)
    final = work.parent / f"{manifest.kind}-{identity[:12]}"
    try:
        same = open_artifact(final)
    except ArtifactError:  # nothing there yet, or something damaged
        _put_in_place(work, final)
        return Artifact(final, done)
    _append_evidence(work / EVIDENCE, same)
    return same


def open_artifact(path: Path, kind: Kind | None = None, *, verify: bool = True) -> Artifact:
    """Read the artifact at `path` and, unless `verify` is off, check every byte of its payload.

    Raises:
        ArtifactError: no artifact, one of a newer schema, of another kind, or changed since it was written; names
            the file.

    """
    path = path.resolve()
    manifest = read_manifest(path)
    if kind and manifest.kind != kind:
        raise ArtifactError(
            f"{path} is of kind {manifest.kind!r}, not {kind!r}", hint=f"the folder wanted is called {kind}-..."
        )
    opened = Artifact(path, manifest)
    if verify:
        verify_payload(opened)
    return opened


def verify_payload(artifact: Artifact, sha256: Callable[[Path], str] = sha256_file) -> None:
    """Check every byte of the payload, several files at a time; `sha256` may know the hash of a file already.

    Raises:
        ArtifactError: something was changed, cut, added or removed; names the first such file.

    """
    path, manifest = artifact
    here = dict(_payload(path))
    with closing(_damage(artifact, here, sha256)) as found:
        for damage in found:
            raise damage
    for name in here.keys() - manifest.files.keys():
        raise ArtifactError(f"{path}: {on_one_line(name)} does not belong to it", hint="remove it")


def is_damaged(path: Path) -> bool:
    """Whether anything that was sealed at `path` is gone or was changed; what was only added damages nothing.

    Raises:
        ArtifactError: it is of a newer schema.

    """
    try:
        artifact = open_artifact(path, verify=False)
    except ArtifactError:
        if is_artifact(path) and versioned.is_newer(read_up_to(path / MANIFEST, LARGEST_MANIFEST), SCHEMA):
            raise
        return True
    with closing(_damage(artifact, dict(_payload(path)), sha256_file)) as found:
        return next(found, None) is not None


def read_manifest(path: Path) -> Manifest:
    """`artifact.json` of the artifact at `path`, its payload unread.

    Raises:
        ArtifactError: there is none, it is no manifest, or one of a newer schema.

    """
    file = path / MANIFEST
    try:
        text = read_up_to(file, LARGEST_MANIFEST)
    except OSError:
        raise ArtifactError(f"{path} is not an artifact: it has no {MANIFEST}") from None
    if len(text) > LARGEST_MANIFEST:
        raise ArtifactError(
            f"{file} cannot be read: a manifest has at most {LARGEST_MANIFEST} bytes", hint=_remedy_of_unread(path)
        )
    return versioned.parse(Manifest, text, file, SCHEMA, ArtifactError, hint=_remedy_of_unread(path))


def is_artifact(path: Path) -> bool:
    """Whether `path` claims to be an artifact."""
    return (path / MANIFEST).is_file()


def quantized_base(path: Path) -> Manifest | None:
    """The manifest of the NF4 base at `path`, packed or dequantized; None for any other folder.

    Its `base` is the 16-bit model that it was made of, its `quantization` which values it holds: `kind` says how.
    """
    manifest = read_manifest(path) if is_artifact(path) else None
    return manifest if manifest and manifest.kind in {"base-nf4", "base-dequantized"} else None


def check_base(artifact: Artifact, weights_sha256: str, base_id: str) -> None:
    """Refuse an artifact that was made for another base."""
    wanted = artifact.manifest.base
    if wanted.weights_sha256 != weights_sha256:
        raise ArtifactError(
            f"{artifact.path.name} was trained on {on_one_line(wanted.id)} "
            f"(weights {on_one_line(wanted.weights_sha256[:12])}), "
            f"not on {on_one_line(base_id)} (weights {weights_sha256[:12]})",
            hint=f"use the base {on_one_line(wanted.id)} at revision {on_one_line(wanted.revision)}",
        )


def add_evidence(artifact: Artifact, stem: str, text: str) -> Path:
    """Append `evidence/<stem>-<n>.json`; nothing that is there is replaced."""
    artifact.evidence.mkdir(exist_ok=True)
    taken = (path.stem.removeprefix(f"{stem}-") for path in artifact.evidence.glob(f"{stem}-*.json"))
    number = 1 + max((int(number) for number in taken if number.isdigit()), default=0)
    path = artifact.evidence / f"{stem}-{number}.json"
    write_atomic(path, text)
    return path


def hash_payload(folder: Path) -> dict[str, FileRecord]:
    """{path relative to `folder`: its record} of every payload file."""
    return {name: FileRecord(size=path.stat().st_size, sha256=sha256_file(path)) for name, path in _payload(folder)}


def content_id(files: dict[str, FileRecord]) -> str:
    """Hex SHA-256 over the sorted (path, size, sha256) of the payload."""
    return sha256_listing((name, record.size, record.sha256) for name, record in files.items())


def _damage(artifact: Artifact, here: Mapping[str, Path], sha256: Callable[[Path], str]) -> Generator[ArtifactError]:
    """Each way in which it is not what was sealed: what is wrong with a file first, another's folder name last.

    `here` is its payload, as `_payload` finds it.
    """
    path, manifest = artifact
    command = on_one_line(shlex.join(_maker(path, manifest)))
    fix = f"`{command}` makes it again; or restore {path.name} from a copy"
    for name, record in manifest.files.items():
        if name not in here:
            yield ArtifactError(f"{path}: {on_one_line(name)} is missing", hint=fix)
        elif (size := here[name].stat().st_size) != record.size:
            what = f"has {size} bytes, not {record.size}: truncated or replaced"
            yield ArtifactError(f"{path}: {on_one_line(name)} {what}", hint=fix)
    with ThreadPoolExecutor(_HASHERS) as pool:
        hashes = {name: pool.submit(sha256, here[name]) for name in manifest.files if name in here}
        try:
            for name, found in hashes.items():
                if found.result() != manifest.files[name].sha256:
                    yield ArtifactError(f"{path}: {on_one_line(name)} was changed after it was written", hint=fix)
        finally:
            pool.shutdown(cancel_futures=True)
    if content_id(manifest.files) != manifest.content_id or not path.name.endswith(manifest.content_id[:12]):
        yield ArtifactError(f"{path}: {MANIFEST} does not fit its content id", hint=fix)


def _maker(path: Path, manifest: Manifest) -> Sequence[str]:
    """The command that makes it again: of a base every option that decides which one is built, and where."""
    command, base = _MAKER[manifest.kind], manifest.base
    if not manifest.kind.startswith("base-"):
        return command
    named = [base.id if word == "BASE" else word for word in command]
    # Of a hub model; that of the bundled one is its package's, and a folder has none.
    revision = ["--revision", base.revision] if base.revision and not base.id.startswith(BUNDLED_PREFIX) else []
    double = [] if manifest.quantization.double else ["--no-double"]
    return [*named, *revision, *double, "--out", str(path.parent)]


def _remedy_of_unread(path: Path) -> str:
    """What to do about a manifest that is no manifest: what its folder's name alone tells."""
    kind = next((kind for kind in _MAKER if path.name.startswith(f"{kind}-")), None)
    if kind is None:
        return f"restore {path.name} from a copy; an adapter is served without its {MANIFEST}, too"
    options = ", with the options that it was built with," if kind.startswith("base-") else ""
    return f"`{shlex.join(_MAKER[kind])}`{options} makes it again; or restore {path.name} from a copy"


def _put_in_place(work: Path, final: Path) -> None:
    damaged = work.with_name(f"{work.name}-damaged")
    if final.exists():
        os.rename(final, damaged)  # noqa: PTH104
    os.rename(work, final)  # noqa: PTH104 - the one rename that makes it real
    sync_directory(final.parent)
    shutil.rmtree(damaged, ignore_errors=True)


def _append_evidence(folder: Path, artifact: Artifact) -> None:
    """Numbered evidence (`parity-1.json`) is appended; `reference.jsonl` follows from the payload and is there."""
    for path in sorted(folder.glob("*-*.json")):
        add_evidence(artifact, path.stem.rpartition("-")[0], path.read_text(encoding="utf-8"))


def _payload(folder: Path) -> Iterable[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST and not name.startswith(f"{EVIDENCE}/"):
            yield name, path
