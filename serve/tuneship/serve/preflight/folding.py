"""A sealed copy of an adapter whose settings SGLang would refuse or misread, in the words that it understands.

The user's files are not touched. The copy lies in the cache under a name made of what is in it, whole or not at all:
the tensors byte for byte, and an `adapter_config.json` that means the same (docs/decisions/0008).
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from tuneship.core import artifact
from tuneship.core.cache import cache_dir
from tuneship.core.errors import ArtifactError
from tuneship.core.files import sha256_file, sha256_text, sync_directory, sync_tree
from tuneship.serve.preflight.files import CONFIG, WEIGHTS


def copy(weights: Path, digest: str, config: dict[str, Any]) -> Path:
    """The directory of an adapter with the tensors in `weights` and the settings `config`, made if it is not there.

    `digest` is the SHA-256 that `weights` had when they were checked.
    """
    text = json.dumps(config, indent=1, sort_keys=True)
    final = cache_dir() / "adapters" / _name(digest, text)
    if _is_whole(final, digest, text):
        return final
    with artifact.draft(final.parent) as work:
        shutil.copyfile(weights, work / WEIGHTS)
        (work / CONFIG).write_text(text, encoding="utf-8")
        if not _is_whole(work, digest, text):
            raise ArtifactError(
                f"{weights} was changed while it was checked", hint="try again when nobody writes to it"
            )
        work.chmod(0o755)
        sync_tree(work)
        _put(work, final)
    return final


def is_name_of(folder: Path, weights_sha256: str, config: bytes) -> bool:
    """Whether `folder` is called as a copy with these tensors and this `adapter_config.json` is."""
    return folder.name == _name(weights_sha256, config.decode(errors="replace"))


def _name(digest: str, text: str) -> str:
    return sha256_text(f"{digest}\n{text}")[:16]


def _put(work: Path, final: Path) -> None:
    """Rename `work` to `final`; one that is damaged steps aside, one that another server has just made will do."""
    if final.exists():
        shutil.rmtree(final)
    try:
        os.rename(work, final)  # noqa: PTH104 - the one rename that makes it real
    except OSError:
        if not final.is_dir():
            raise
    sync_directory(final.parent)


def _is_whole(folder: Path, digest: str, text: str) -> bool:
    try:
        written = (folder / CONFIG).read_text(encoding="utf-8")
        return written == text and sha256_file(folder / WEIGHTS) == digest
    except (OSError, UnicodeDecodeError):
        return False
