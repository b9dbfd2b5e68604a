"""What a stage's result depends on, as one id: `up` runs a stage again exactly when its input id changed.

Training is not bit-reproducible, so the id is over what goes in, not over what comes out. File paths are left out:
the bytes they lead to are in it through `contents`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from tuneship.core import data_source
from tuneship.core.data_source import Folder
from tuneship.core.files import sha256_file, sha256_text
from tuneship.core.recipe import Recipe

# Where files lie, and what changes no result.
_LEFT_OUT: Mapping[str, Any] = {
    "model": {"id", "revision"},
    "data": {"train", "heldout"},
    "train": {"save_steps", "keep_checkpoints", "spike", "report_to"},
    "bench": {"eval": {"__all__": {"data"}}, "load": {"trace"}, "gate": {"baseline"}},
}


def input_id(stage: str, version: int, recipe: Recipe, sections: Iterable[str], contents: Iterable[str]) -> str:
    """Hex SHA-256 over the stage, its version, the recipe sections it reads, and the ids of all content it reads."""
    parts = [stage, str(version)]
    parts += [getattr(recipe, name).model_dump_json(exclude=_LEFT_OUT.get(name)) for name in sorted(sections)]
    return sha256_text("\n".join([*parts, *contents]))


def data_sha256(pattern: str) -> str:
    """Hex SHA-256 of the rows at `pattern`, as far as that can be said without reading them; empty for an empty one.

    Over the bytes of files in order; of a folder's files with their names; the commit of a data set of the hub.
    """
    if not pattern:
        return ""
    found = data_source.locate(pattern)
    if not isinstance(found, Folder):
        return hashlib.sha256("".join(map(sha256_file, found)).encode()).hexdigest()
    which = [found.config, found.split]
    if found.revision:
        return sha256_text("\n".join([found.revision, *which]))
    files = sorted(path for path in found.path.rglob("*") if path.is_file())
    named = [f"{path.relative_to(found.path).as_posix()} {sha256_file(path)}" for path in files]
    return sha256_text("\n".join([*which, *named]))
