"""A sealed copy of an adapter whose settings SGLang would refuse or misread, in the words that it understands.

The user's files are not touched. The copy lies in the cache under a name made of what is in it, whole or not at all:
the tensors byte for byte (padded and scaled where ranks or scalings differ), and an `adapter_config.json` that means
the same (docs/decisions/0008). A server has copies of its own of what it serves: one here that nobody has asked for in
a month is removed when another is made.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from tuneship.core import artifact, even
from tuneship.core.cache import cache_dir
from tuneship.core.errors import ArtifactError
from tuneship.core.files import sha256_file, sha256_text, sync_directory, sync_tree
from tuneship.core.servable import Folding, Layer
from tuneship.serve.preflight.files import CONFIG, WEIGHTS

_UNUSED_S = 30 * 24 * 3600.0


def copy(weights: Path, digest: str, folding: Folding, layers: Mapping[str, Layer]) -> Path:
    """The directory of the adapter in `weights`, which has these `layers`, folded; made if it is not there.

    `digest` is the SHA-256 that `weights` had when they were checked.
    """
    text = json.dumps(folding.config, indent=1, sort_keys=True)
    rewritten = even.changes(folding, {name: layer.rank for name, layer in layers.items()})
    folder = cache_dir() / "adapters"
    known = folder / _name(digest, text)
    if not rewritten and _used(known) and _is_whole(known, digest, text):
        return known
    with artifact.draft(folder) as work:
        if rewritten:
            raw = weights.read_bytes()
            changed = hashlib.sha256(raw).hexdigest() != digest
            even.rewrite(raw, folding, work / WEIGHTS)
            digest = sha256_file(work / WEIGHTS)
        else:
            shutil.copyfile(weights, work / WEIGHTS)
            changed = sha256_file(work / WEIGHTS) != digest
        if changed:
            raise ArtifactError(
                f"{weights} was changed while it was checked", hint="try again when nobody writes to it"
            )
        (work / CONFIG).write_text(text, encoding="utf-8")
        final = folder / _name(digest, text)
        if not _is_whole(final, digest, text):
            work.chmod(0o755)
            sync_tree(work)
            _put(work, final)
    _used(final)
    _remove_unused(folder)
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


def _used(final: Path) -> bool:
    """Whether it is there; if it is, it was used now, and stays."""
    try:
        os.utime(final)
    except OSError:
        return False
    return True


def _remove_unused(folder: Path) -> None:
    """Also what somebody who was killed left half done."""
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _UNUSED_S:
                shutil.rmtree(path)


def _is_whole(folder: Path, digest: str, text: str) -> bool:
    try:
        written = (folder / CONFIG).read_text(encoding="utf-8")
        return written == text and sha256_file(folder / WEIGHTS) == digest
    except (OSError, UnicodeDecodeError):
        return False
