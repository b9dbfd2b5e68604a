"""The server's own copies of adapters: what was checked is what SGLang reads, and nobody changes it in between.

    store = AdapterStore(state / "adapters")
    store.sweep({version.path for version in registry.present()})
    begun = store.begin(folder)     # while it is being checked; forgotten, where it is not taken
    path = store.copy(preflight.check(folder, base, limits), begun)
    store.prove(checked, path)      # or `preflight.prove`, while an engine reads it: before anybody asks that
    store.flush(path)               # the same, before it is written down that it is served
    store.drop(path)

A copy holds the two files that SGLang reads, in a directory of its own for each load (`3fa9c1d20b77-2`), whole or not
at all. It goes when its version is unloaded: SGLang takes an unloaded adapter back from its old path when somebody asks
for it, and then finds nothing there.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import NamedTuple

from tuneship.core import artifact
from tuneship.core.errors import RegistryError
from tuneship.core.files import sync_directory, sync_tree
from tuneship.core.progress import say
from tuneship.serve.preflight import CheckedAdapter, proof
from tuneship.serve.preflight.files import CONFIG, WEIGHTS
from tuneship.serve.registry.records import SHORT

_HALF = "."
"""Begins the name of what is being made or removed."""
_EARLY_BYTES = 1 << 28
"""What is copied before it is known to be an adapter is no larger."""


class Begun(NamedTuple):
    """A copy of which it is not known yet whether it is of an adapter."""

    source: Path
    work: Path


class AdapterStore:
    """The copies of one server, in one folder; nobody else writes there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self._numbers = count(1)
        """Of the loads of this server: no path is used twice while an engine may remember it."""

    def keep(self, checked: CheckedAdapter) -> Path:
        """`copy`, `prove` and `flush` in one: the directory of a copy that may be served.

        Raises:
            ArtifactError, RegistryError: as those; nothing is left of it.

        """
        path = self.copy(checked)
        try:
            self.prove(checked, path)
            self.flush(path)
        except BaseException:
            self.drop(path)
            raise
        return path

    def begin(self, path: Path) -> Begun | None:
        """Copy what may be an adapter, while that is found out, to where it counts for nothing.

        None where it is better copied when it has been checked: a large one, links, files that are none.
        """
        files = [path / name for name in (CONFIG, WEIGHTS)]
        with suppress(OSError):  # whatever it is, it is said when that is copied in earnest
            if any(file.is_symlink() or not file.is_file() or file.stat().st_size > _EARLY_BYTES for file in files):
                return None
            self._folder.mkdir(parents=True, exist_ok=True)
            begun = Begun(path.resolve(), Path(tempfile.mkdtemp(dir=self._folder, prefix=f"{_HALF}begun-")))
            try:
                for file in files:
                    _copy(file, begun.work)
            except BaseException:
                self.forget(begun)
                raise
            return begun
        return None

    def forget(self, begun: Begun | None) -> None:
        """Remove what was begun, unless `copy` has taken it."""
        if begun:
            shutil.rmtree(begun.work, ignore_errors=True)

    def copy(self, checked: CheckedAdapter, begun: Begun | None = None) -> Path:
        """Copy the adapter that was checked; the copy's directory, of which nothing is proven yet.

        Raises:
            ArtifactError: it is gone.
            RegistryError: there is no room for it.

        """
        with self._writing(), artifact.draft(self._folder) as work:
            if begun and begun.source == checked.path:
                os.rename(begun.work, work)  # noqa: PTH104
            else:
                for name in (CONFIG, WEIGHTS):
                    try:
                        _copy(checked.path / name, work)
                    except FileNotFoundError:
                        raise proof.changed(checked) from None
            work.chmod(0o755)
            return self._put(work, checked.content_id[:SHORT])

    def prove(self, checked: CheckedAdapter, path: Path) -> None:
        """Make sure that the copy at `path` is what was checked.

        Raises:
            ArtifactError: it was changed since it was checked.

        """
        with self._writing():
            if not proof.is_of(checked, path):
                raise proof.changed(checked)

    def flush(self, path: Path) -> None:
        """Let the copy at `path` outlive a power cut.

        Raises:
            RegistryError: it cannot be written to the disk.

        """
        with self._writing():
            sync_tree(path)
            sync_directory(self._folder)

    def drop(self, path: Path) -> None:
        """Remove the copy at `path`, which nobody reads any more; one that is gone already, or lies elsewhere, is none.

        One that cannot be removed is said, and left to the next `sweep`.
        """
        if path.parent != self._folder:
            return
        try:
            self._remove(path)
        except OSError as error:
            say(f"warning: {path}, which nobody reads any more, cannot be removed: {error.strerror or error}")

    def sweep(self, kept: AbstractSet[Path]) -> list[Path]:
        """Remove whatever is not in `kept`: copies that nobody refers to, halves that a crash left; what it removed.

        Raises:
            RegistryError: the folder cannot be read, or something in it cannot be removed.

        """
        try:
            strangers = sorted(set(self._folder.iterdir()) - kept) if self._folder.is_dir() else []
            for path in strangers:
                self._remove(path)
        except OSError as error:
            raise RegistryError(
                f"copies that nobody reads cannot be removed from {self._folder}: {error.strerror or error}",
                hint="may this user write there? is its disk read-only?",
            ) from error
        return strangers

    def _put(self, work: Path, stem: str) -> Path:
        """Rename `work` to the next free name of that stem."""
        for number in self._numbers:
            final = self._folder / f"{stem}-{number}"
            if not final.exists():  # it may be the last server's
                os.rename(work, final)  # noqa: PTH104 - the one rename that makes it real
                return final
        raise AssertionError

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RegistryError(
                f"an adapter cannot be copied to {self._folder}: {error.strerror}", hint="is its disk full?"
            ) from error

    def _remove(self, path: Path) -> None:
        """First its name, so that half of it never stands there under it."""
        going = path
        if path.exists() and not path.name.startswith(_HALF):
            going = path.with_name(f"{_HALF}gone-{path.name}")
            shutil.rmtree(going, ignore_errors=True)  # of a crash
            os.rename(path, going)  # noqa: PTH104
        if going.is_dir() and not going.is_symlink():
            shutil.rmtree(going, ignore_errors=True)
        else:
            going.unlink(missing_ok=True)
        if self._folder.is_dir():
            sync_directory(self._folder)


def _copy(file: Path, folder: Path) -> None:
    with file.open("rb") as source, (folder / file.name).open("wb") as copy:
        # A disk that can shares the blocks. What the kernel does not copy between these two is left to us.
        with suppress(OSError):
            while os.copy_file_range(source.fileno(), copy.fileno(), 1 << 30):
                pass
        shutil.copyfileobj(source, copy, 1 << 20)
