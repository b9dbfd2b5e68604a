"""Whether a copy is what was checked.

An artifact says what its bytes must be, a folded copy carries it in its name; of any other adapter the content id was
made of the bytes that were checked.
"""

from __future__ import annotations

from pathlib import Path

from tuneship.core import artifact
from tuneship.core.artifact import FileRecord
from tuneship.core.errors import ArtifactError
from tuneship.core.files import sha256_file
from tuneship.core.quoting import quoted
from tuneship.serve.preflight import folding
from tuneship.serve.preflight.checked import CheckedAdapter
from tuneship.serve.preflight.files import CONFIG, WEIGHTS


def prove(checked: CheckedAdapter, copy: Path) -> None:
    """Make sure that `copy` is of the adapter that was `checked`; the rest of an artifact is held to its manifest too.

    Raises:
        ArtifactError: it was damaged before it was copied, or changed since it was checked.

    """
    try:
        records = _records(copy)
        if not _are_of(checked, records, (copy / CONFIG).read_bytes()):
            raise changed(checked)
        _verify(checked, records)  # the copy's hashes stand for the two files: it is what answers
    except (ArtifactError, OSError):
        _verify(checked, {})  # of what is damaged in itself that is said
        raise changed(checked) from None


def is_of(checked: CheckedAdapter, copy: Path) -> bool:
    """Whether the bytes in `copy` are those that `checked.content_id` stands for, however it was made."""
    return _are_of(checked, _records(copy), (copy / CONFIG).read_bytes())


def _records(copy: Path) -> dict[str, FileRecord]:
    return {n: FileRecord(size=(copy / n).stat().st_size, sha256=sha256_file(copy / n)) for n in (CONFIG, WEIGHTS)}


def _are_of(checked: CheckedAdapter, copied: dict[str, FileRecord], config: bytes) -> bool:
    if artifact.content_id(copied) == checked.content_id:  # a plain directory: the two files are its identity
        return True
    if artifact.is_artifact(checked.path):
        listed = artifact.read_manifest(checked.path).files
        return artifact.content_id(listed) == checked.content_id and copied.items() <= listed.items()
    return folding.is_name_of(checked.path, copied[WEIGHTS].sha256, config)


def changed(checked: CheckedAdapter) -> ArtifactError:
    """It is no more what it was."""
    return ArtifactError(
        f"adapter {quoted(checked.name)} was changed while it was being loaded: {checked.path}",
        hint="load it again when nobody writes to it",
    )


def _verify(checked: CheckedAdapter, known: dict[str, FileRecord]) -> None:
    """Hold an artifact against its manifest; files that are `known` are not read."""
    if not artifact.is_artifact(checked.path):
        return
    opened = artifact.open_artifact(checked.path, kind="adapter", verify=False)
    if opened.manifest.content_id != checked.content_id:
        raise changed(checked)
    here = {opened.path / name: record.sha256 for name, record in known.items()}
    artifact.verify_payload(opened, lambda file: here.get(file) or sha256_file(file))
