"""Is a copy what was checked? Hashed and read in one pass, so that what is then judged is what an engine reads.

An artifact says what its bytes must be, a folded copy carries it in its name; of any other adapter the content id was
made of the bytes that were checked.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from tuneship.core import artifact
from tuneship.core.artifact import FileRecord
from tuneship.core.errors import ArtifactError
from tuneship.core.files import sha256_file
from tuneship.serve import tensors
from tuneship.serve.preflight import folding
from tuneship.serve.preflight.checked import CheckedAdapter
from tuneship.serve.preflight.files import CONFIG, WEIGHTS
from tuneship.serve.tensors import Contents


def read(checked: CheckedAdapter, copy: Path) -> Contents:
    """What is in the weights of `copy`, which is proven to be of the adapter that was `checked`.

    The rest of an artifact is held against its manifest too.

    Raises:
        ArtifactError: it was damaged before it was copied, or changed since it was checked.

    """
    try:
        contents = tensors.read(copy / WEIGHTS)
        weights = FileRecord(size=contents.size, sha256=contents.sha256)
        if not is_of(checked, copy, weights):
            raise changed(checked)
        # The copy's hashes stand for the two files: it is what answers.
        _verify(checked, {WEIGHTS: weights.sha256, CONFIG: sha256_file(copy / CONFIG)})
    except (ArtifactError, OSError):
        _verify(checked, {})  # of what is damaged in itself that is said
        raise changed(checked) from None
    return contents


def is_of(checked: CheckedAdapter, copy: Path, weights: FileRecord) -> bool:
    """Whether the bytes in `copy` are those that `checked.content_id` stands for, however it was made."""
    config = (copy / CONFIG).read_bytes()
    copied = {CONFIG: FileRecord(size=len(config), sha256=hashlib.sha256(config).hexdigest()), WEIGHTS: weights}
    if artifact.content_id(copied) == checked.content_id:  # a plain directory: the two files are its identity
        return True
    if artifact.is_artifact(checked.path):
        listed = artifact.read_manifest(checked.path).files
        return artifact.content_id(listed) == checked.content_id and copied.items() <= listed.items()
    return folding.is_name_of(checked.path, weights.sha256, config)


def changed(checked: CheckedAdapter) -> ArtifactError:
    """It is no more what it was."""
    return ArtifactError(
        f"adapter {checked.name!r} was changed while it was being loaded: {checked.path}",
        hint="load it again when nobody writes to it",
    )


def _verify(checked: CheckedAdapter, known: dict[str, str]) -> None:
    """Hold an artifact against its manifest; files with a `known` SHA-256 are not read."""
    if not artifact.is_artifact(checked.path):
        return
    opened = artifact.open_artifact(checked.path, kind="adapter", verify=False)
    if opened.manifest.content_id != checked.content_id:
        raise changed(checked)
    here = {opened.path / name: digest for name, digest in known.items()}
    artifact.verify_payload(opened, lambda file: here.get(file) or sha256_file(file))
