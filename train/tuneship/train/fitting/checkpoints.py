"""Checkpoints of a training that has not ended: which are whole, and whether this recipe may go on from one.

    stages/train/attempt-<n>/checkpoints/checkpoint-<step>/    the trainer's own files, and tuneship.json beside them

The trainer writes adapter, optimizer, scheduler and random numbers; `tuneship.json` is written last, with the sizes of
all of them. So a kill in the middle of writing leaves a folder without it, which nobody takes for a checkpoint.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from tuneship.core import versioned
from tuneship.core.errors import ArtifactError, TrainError
from tuneship.core.files import sync_tree, write_atomic
from tuneship.core.recipe import Recipe

FOLDER = "checkpoints"
MARKER = "tuneship.json"
SCHEMA = 1

_SECTIONS = ("model", "quantization", "data", "lora", "train")
# Where files lie does not matter, what is in them does, and of a template its text, which is among the contents; nor
# what changes only how a step is cut, or what is kept of it.
_FREE = {
    *("model.id", "model.revision", "data.train", "data.heldout", "data.template"),
    *(
        "train.micro_batch",
        "train.checkpointing",
        "train.save_steps",
        "train.keep_checkpoints",
        "train.spike",
        "train.report_to",
    ),
}


class Identity(BaseModel):
    """What the losses of a training follow from: recipe keys, and hashes of what they lead to, by the key's name."""

    model_config = ConfigDict(frozen=True)

    keys: dict[str, Any]
    contents: dict[str, str] = {}

    @classmethod
    def of(cls, recipe: Recipe, contents: Mapping[str, str]) -> Identity:
        """Of `recipe`, whose data and base have these hashes."""
        sections = {name: getattr(recipe, name).model_dump(mode="json") for name in _SECTIONS}
        keys = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
        return cls(keys={key: value for key, value in keys.items() if key not in _FREE}, contents=dict(contents))

    def changes(self, now: Identity) -> list[str]:
        """What stands in the way of going on, a sentence a key; a key that was not there then is at its default."""
        values = [
            f"{key} was {self.keys[key]!r} and is {value!r}"
            for key, value in now.keys.items()
            if key in self.keys and self.keys[key] != value
        ]
        return values + [
            f"what {key} leads to has changed" for key, value in now.contents.items() if self.contents.get(key) != value
        ]


class Marker(BaseModel):
    """`tuneship.json`: the step, how it was cut, what was trained, and the files with their sizes in bytes."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    schema_: int = Field(default=SCHEMA, alias="schema")
    step: int
    micro_batch: int
    identity: Identity
    files: dict[str, int]


class Checkpoint(NamedTuple):
    """One that is whole."""

    path: Path
    marker: Marker

    @property
    def attempt(self) -> Path:
        """The attempt that wrote it."""
        return self.path.parent.parent


def seal(path: Path, step: int, micro_batch: int, identity: Identity) -> None:
    """Declare what the trainer wrote into `path` whole."""
    sync_tree(path)
    marker = Marker(step=step, micro_batch=micro_batch, identity=identity, files=_sizes(path))
    write_atomic(path / MARKER, marker.model_dump_json(by_alias=True))


def newest(stage: Path) -> Checkpoint | None:
    """The newest attempt's last whole checkpoint, of all attempts below `stage` that have one."""
    attempts = sorted(stage.glob("attempt-*"), key=lambda path: int(path.name.removeprefix("attempt-")), reverse=True)
    return next((last for last in map(last_of, attempts) if last), None)


def last_of(attempt: Path) -> Checkpoint | None:
    """The whole checkpoint of `attempt` with the most steps."""
    found = [checkpoint for path in (attempt / FOLDER).glob("checkpoint-*") if (checkpoint := _read(path))]
    return max(found, key=lambda checkpoint: checkpoint.marker.step, default=None)


def require_unchanged(checkpoint: Checkpoint, now: Identity) -> None:
    """Nothing but where files lie and how steps are cut may have changed.

    Raises:
        TrainError: names every key that did.

    """
    changes = checkpoint.marker.identity.changes(now)
    if changes:
        raise TrainError(
            f"{checkpoint.attempt.name} cannot be resumed: {'; '.join(changes)}",
            hint="set it back to go on from its checkpoint, or leave out --resume to train from the start",
        )


def remove_all(stage: Path, *, but: Path | None = None) -> None:
    """Remove every attempt's checkpoints, those of `but` excepted."""
    for attempt in stage.glob("attempt-*"):
        if attempt != but:
            shutil.rmtree(attempt / FOLDER, ignore_errors=True)


def _read(path: Path) -> Checkpoint | None:
    """None where something is missing or cut short."""
    file = path / MARKER
    try:
        marker = versioned.parse(Marker, file.read_bytes(), file, SCHEMA, ArtifactError)
    except (OSError, ArtifactError):
        return None
    return Checkpoint(path, marker) if _sizes(path) == marker.files else None


def _sizes(path: Path) -> dict[str, int]:
    return {
        file.relative_to(path).as_posix(): file.stat().st_size
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != MARKER
    }
