"""What versions are verified by, kept by the server: it may have to verify one again when its source is gone.

    kept = KeptEvidence(state / "evidence")
    kept.keep(version, source, kept.strangers(here))    # in a folder that is called as the copy that SGLang reads
    kept.of(version)                                    # stands for the directory that the version came from

Only what `verify` reads is kept: the manifest and the evidence of an adapter of ours. Of others there is neither.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from pathlib import Path

from tuneship.core import artifact
from tuneship.core.artifact import EVIDENCE
from tuneship.core.errors import RegistryError
from tuneship.core.files import sync_directory, sync_tree
from tuneship.serve.registry.records import Version

FOLDER = "evidence"
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
        """Where that of versions lies whose copies are not among `here`, the names of the folders of those present."""
        if not self._folder.is_dir():
            return []
        return [path for path in self._folder.iterdir() if path.name not in here and not path.name.startswith(_HALF)]

    def sweep(self, here: AbstractSet[str]) -> None:
        """Forget that of all versions but `here`, and what a crash left half done."""
        for path in [*self.strangers(here), *self._folder.glob(f"{_HALF}*")]:
            shutil.rmtree(path, ignore_errors=True)

    def keep(self, version: Version, source: Path, strangers: Iterable[Path]) -> None:
        """Keep what `version` is verified by, out of `source`, where it came from; forget `strangers`.

        Raises:
            RegistryError: it cannot be written.

        """
        kept = self.of(version)
        try:
            for path in strangers:
                shutil.rmtree(path, ignore_errors=True)
            if source == kept or kept.exists() or not artifact.is_artifact(source):
                return
            self._folder.mkdir(parents=True, exist_ok=True)
            with artifact.draft(self._folder) as work:
                shutil.copyfile(source / artifact.MANIFEST, work / artifact.MANIFEST)
                if (source / EVIDENCE).is_dir():
                    shutil.copytree(source / EVIDENCE, work / EVIDENCE)
                work.chmod(0o755)
                sync_tree(work)
                work.rename(kept)
            sync_directory(self._folder)
        except OSError as error:
            raise RegistryError(
                f"evidence cannot be copied to {self._folder}: {error.strerror}", hint="is its disk full?"
            ) from error
