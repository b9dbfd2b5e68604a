"""What versions are verified by, kept by the server: it may have to verify one again when its source is gone.

    kept = KeptEvidence(state / "evidence")
    kept.keep(version, source, files_of(source), kept.strangers(here))
    kept.of(version)    # stands for the directory that it came from; is called as the copy that SGLang reads

Only what `verify` reads is kept: of an adapter of ours its manifest, `reference.jsonl`, and the last `deferred-*.json`.
Of others there is none. Adapters come from anywhere, so `files_of` is asked before any of it is read: there are files
alone, `LARGEST_BYTES` of them at most, and no link leads out of the adapter's directory.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable
from collections.abc import Set as AbstractSet
from pathlib import Path

from tuneship.core import artifact
from tuneship.core.artifact import EVIDENCE
from tuneship.core.errors import ArtifactError, RegistryError
from tuneship.core.files import sync_directory, sync_tree
from tuneship.core.parity import REFERENCE_FILE
from tuneship.serve.preflight.files import refuse_strangers
from tuneship.serve.registry.records import Version

FOLDER = "evidence"
LARGEST_BYTES = 1 << 30
"""Training keeps the rows of 5,000 answer tokens, some 50 bytes for each of their tokens."""
_HALF = "."
"""Begins the name of what is being made: that of another load, on its way."""


class KeptEvidence:
    """The evidence of one server's versions, in one folder; nobody else writes there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()

    def of(self, version: Version) -> Path:
        """Where that of `version` lies, if it has any."""
        return self._folder / version.path.name

    def strangers(self, here: AbstractSet[str]) -> list[Path]:
        """Where that of versions lies whose copies are not among `here`, the names of the folders of those present.

        Raises:
            RegistryError: the folder cannot be read.

        """
        try:
            found = list(self._folder.iterdir()) if self._folder.is_dir() else []
        except OSError as error:
            raise RegistryError(
                f"evidence in {self._folder} cannot be read: {error.strerror or error}",
                hint="may this user read that folder?",
            ) from error
        return [path for path in found if path.name not in here and not path.name.startswith(_HALF)]

    def sweep(self, here: AbstractSet[str]) -> None:
        """Forget that of all versions but `here`, and what a crash left half done.

        Raises:
            RegistryError: as `strangers`.

        """
        for path in [*self.strangers(here), *self._folder.glob(f"{_HALF}*")]:
            shutil.rmtree(path, ignore_errors=True)

    def keep(self, version: Version, source: Path, files: Collection[Path], strangers: Iterable[Path]) -> None:
        """Keep `files` of `source`, by which `version` is verified, if it is an artifact; forget `strangers`.

        Raises:
            RegistryError: it cannot be written.

        """
        kept = self.of(version)
        try:
            for path in strangers:
                shutil.rmtree(path, ignore_errors=True)
            if source == kept or kept.exists() or source / artifact.MANIFEST not in files:
                return
            self._folder.mkdir(parents=True, exist_ok=True)
            with artifact.draft(self._folder) as work:
                for file in files:
                    copy = work / file.relative_to(source)
                    copy.parent.mkdir(exist_ok=True)
                    shutil.copyfile(file, copy)
                work.chmod(0o755)
                sync_tree(work)
                work.rename(kept)
            sync_directory(self._folder)
        except OSError as error:
            raise RegistryError(
                f"evidence cannot be copied to {self._folder}: {error.strerror or error}", hint="is its disk full?"
            ) from error


def files_of(source: Path) -> list[Path]:
    """What a verification reads in the directory of an adapter, as far as it is there.

    Raises:
        PreflightError: a link leads out of the directory.
        ArtifactError: something is no file, or it is too much.

    """
    evidence = source / EVIDENCE
    wanted = [source / artifact.MANIFEST, evidence / REFERENCE_FILE, *sorted(evidence.glob("deferred-*.json"))[-1:]]
    for file in wanted:
        refuse_strangers(source, file)
    files = [file for file in wanted if file.is_file()]
    if (size := sum(file.stat().st_size for file in files)) > LARGEST_BYTES:
        raise ArtifactError(
            f"{evidence} holds {size} bytes, which nobody reads: evidence has at most {LARGEST_BYTES}",
            hint=f"restore it from a copy; without {REFERENCE_FILE} the adapter is loaded, and not verified",
        )
    return files
