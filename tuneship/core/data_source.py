"""What `data.train` and `data.heldout` name: files, a folder that `datasets` reads, or a data set of the hub.

    data/*.jsonl                    files, by their endings
    data/saved        data/saved:test       a folder, and a split of it
    hub:owner/name    owner/name:test    hub:owner/name/config@revision:split

A hub id without its prefix is told from a path by this: it has two parts, no ending of a data file, and nothing lies
there.
"""

from __future__ import annotations

import glob
import re
from pathlib import Path
from typing import NamedTuple

from tuneship.core.errors import DataError
from tuneship.core.recipe import TABLES

HUB_PREFIX = "hub:"
ENDINGS = (".jsonl", ".ndjson", ".json", *TABLES)
_HUB = re.compile(
    r"(?P<id>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?(:(?P<split>[\w.-]+))?", re.ASCII
)


class HubData(NamedTuple):
    """A data set of the hub; an empty `config` or `split` is the only one that it has."""

    id: str
    config: str
    revision: str
    split: str


class Folder(NamedTuple):
    """A folder that `datasets` wrote or can load; where it came from the hub, its `id` there and the commit."""

    path: Path
    config: str = ""
    split: str = ""
    revision: str = ""
    id: str = ""

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return self.id or self.path.name


def absolute(text: str, root: Path) -> str:
    """`text` as it means the same from every folder; what a recipe in `root` says."""
    if not text or text.startswith(HUB_PREFIX):
        return text
    path = (root / text).resolve()
    if not _is_there(str(path)) and _looks_like_hub(text) and not (root / text.partition("/")[0]).is_dir():
        return HUB_PREFIX + text
    return str(path)


def hub(pattern: str) -> HubData | None:
    """The data set of the hub that `pattern` names; None where it names a path.

    Raises:
        DataError: it has the prefix, and is no id.

    """
    if not pattern.startswith(HUB_PREFIX):
        return None
    match = _HUB.fullmatch(pattern.removeprefix(HUB_PREFIX))
    if not match:
        raise DataError(f"{pattern} is no data set of the hub", hint="hub:owner/name/config@revision:split")
    parts = match.groupdict(default="")
    return HubData(parts["id"], parts["config"], parts["revision"], parts["split"])


def locate(pattern: str) -> Folder | list[Path]:
    """Where the rows lie on this disk: a folder, or files, sorted. Downloads nothing.

    Raises:
        DataError: nothing is there.

    """
    wanted = hub(pattern)
    if wanted:
        return _snapshot(wanted)
    path, _, split = pattern.rpartition(":")
    if Path(pattern).is_dir():
        return Folder(Path(pattern))
    files = sorted(Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file())  # noqa: PTH207 - patterns are absolute
    if not files and path and Path(path).is_dir():
        return Folder(Path(path), split=split)
    if not files:
        raise DataError(f"no data file at {pattern}", hint="data.train and data.heldout are relative to the recipe")
    return files


def is_here(pattern: str) -> bool:
    """Whether `locate` finds something."""
    try:
        locate(pattern)
    except DataError:
        return False
    return True


def _is_there(path: str) -> bool:
    folder = path.rpartition(":")[0]
    return Path(path).exists() or bool(folder and Path(folder).is_dir()) or any(True for _ in glob.iglob(path))  # noqa: PTH207


def _looks_like_hub(text: str) -> bool:
    match = _HUB.fullmatch(text)
    return match is not None and not match["config"] and not text.partition(":")[0].endswith(ENDINGS) and text[0] != "."


def _snapshot(wanted: HubData) -> Folder:
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - 0.2 s that `--help` must not pay
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        path = Path(
            snapshot_download(wanted.id, repo_type="dataset", revision=wanted.revision or None, local_files_only=True)
        )
    except (LocalEntryNotFoundError, HFValidationError):
        raise DataError(
            f"no data set {wanted.id!r}: not in the hub cache, and nothing lies at such a path",
            hint="`tuneship data check` fetches it where the hub can be reached; or name a file, with its ending",
        ) from None
    return Folder(path, wanted.config, wanted.split, path.name, wanted.id)
