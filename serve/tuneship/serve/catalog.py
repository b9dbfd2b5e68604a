"""What a server serves: a table from the name that clients send to the model that answers.

    catalog = read("runs/x/artifacts/merged-3fa9c1d20b77")
    catalog = read("Qwen/Qwen2.5-1.5B-Instruct", Path("runs/sql"), Path("adapters/"), max_rank=64)

Everything in it was checked: artifacts byte by byte, adapters against the base. `Entry.selector` is the adapter's name
inside the engine and never leaves it; clients know `Entry.name` and read `Entry.version` in every answer's header.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

from tuneship.core import artifact, checkpoint, rundir
from tuneship.core.errors import ArtifactError, PreflightError
from tuneship.core.model_source import ModelSource, resolve
from tuneship.core.progress import say
from tuneship.core.quoting import quoted
from tuneship.serve import preflight, quantized
from tuneship.serve.dressed import Dress
from tuneship.serve.preflight import BaseModel, Limits

_ADAPTER_NAME = re.compile(r"[A-Za-z0-9._-]{1,255}")
_BASE_NAME = re.compile(r"[A-Za-z0-9._/-]{1,255}")
"""A colon would be SGLang's own syntax for choosing an adapter. No directory's name is longer; a manifest's may be."""


class Entry(NamedTuple):
    """One name that clients may send as `model`."""

    name: str
    version: str
    """Immutable, such as `sql@3fa9c1d20b77`."""
    selector: str | None
    """The adapter's name in the engine; None for the model that the engine was started with."""
    path: Path
    artifact_id: str
    base_id: str
    source: Path | None = None
    """Where an adapter came from, if SGLang is given a copy of it."""


class Catalog(NamedTuple):
    """All that one server serves; the first entry is the model that the engine loads."""

    mode: Literal["merged", "adapters", "base"]
    entries: tuple[Entry, ...]
    weights: str = "none"
    """How the first entry's checkpoint is quantized, by its own configuration."""
    origin: ModelSource | None = None
    """Where the first entry's checkpoint is from: what adapters that come later are held against."""

    @property
    def base(self) -> Entry:
        """The model that the engine loads: a merged one, or the adapters' base."""
        return self.entries[0]

    @property
    def model_path(self) -> Path:
        """Its checkpoint."""
        return self.base.path


def read(
    model: str,
    *adapters: Path,
    max_rank: int = 64,
    name: str = "",
    to_come: bool = False,
    dress: Dress | None = None,
) -> Catalog:
    """Find and check what is to be served.

    `model` is the directory of a merged artifact or an NF4 base, or a base: a hub id, a path or a bundled id.
    Each of `adapters` is one adapter's directory, a directory of them, or the run that trained one; `name` is what
    clients shall call `model`. `to_come`: adapters may be loaded later, or come from the server's registry. `dress` is
    the chat template that a base is served under in place of its own; a merged model has the one that it was trained
    with.

    Raises:
        ArtifactError: no such model or adapter; changed, truncated, or made for another base.
        PreflightError: an adapter that cannot be served here, or two models of one name.

    """
    source, first = _artifact(Path(model), name) if artifact.is_artifact(Path(model)) else _base(model, name)
    weights = quantized.weights(source.path).method
    whole = bool(first.artifact_id) and not artifact.quantized_base(source.path)
    paths = list(dict.fromkeys(path for folder in adapters for path in _adapters(folder)))
    if dress and not whole:
        path = dress.put_on(source.path, paths)
        version = f"{first.name}@{dress.version(first.version)}"
        source, first = source._replace(path=path), first._replace(path=path, version=version)
    if not adapters and not to_come:
        return Catalog("merged" if whole else "base", (first,), weights, source)
    facts = preflight.read_base(source)
    found = (_adapter(path, facts, Limits(max_rank)) for path in paths)
    return Catalog("adapters", _all_different([first, *found]), weights, source)


def check_names(model: str, *adapters: Path, name: str = "") -> None:
    """Refuse what `read` would refuse of names: this takes no time, and is asked before a base is built for minutes.

    Raises:
        ArtifactError: one of `adapters` is none.
        PreflightError: a name that cannot be served, or two models of one name.

    """
    path = Path(model)
    public = name or (artifact.read_manifest(path).name or path.name if artifact.is_artifact(path) else "")
    first = _checked(_BASE_NAME, public or resolve(model).name, "--name NAME")
    found = dict.fromkeys(path for folder in adapters for path in _adapters(folder))
    named = {path: checked_alias(_name_of(path), _renamed(path)) for path in found}
    _all_different(
        [
            Entry(first, "", None, path, "", ""),
            *(Entry(alias, "", None, source, "", "", source) for source, alias in named.items()),
        ]
    )


def checked_alias(
    name: str, hint: str = "--alias NAME, of at most 255 letters, digits, dots, dashes and underscores"
) -> str:
    """`name`, if adapters may be called so.

    Raises:
        PreflightError: it holds something that would mean more than itself in a request.

    """
    return _checked(_ADAPTER_NAME, name, hint)


def _artifact(path: Path, name: str) -> tuple[ModelSource, Entry]:
    if artifact.read_manifest(path).kind == "adapter":
        raise ArtifactError(
            f"{path} is an adapter, not a model",
            hint=f"tuneship serve BASE --adapters {path}, or tuneship merge its run",
        )
    path = path.resolve()
    opened = artifact.open_artifact(path)
    manifest = opened.manifest
    public = _checked(_BASE_NAME, name or manifest.name or path.name, "--name NAME")
    entry = Entry(public, f"{public}@{opened.id12}", None, path, manifest.content_id, manifest.base.id)
    return ModelSource(str(path), "", path), entry


def _base(model: str, name: str) -> tuple[ModelSource, Entry]:
    source = resolve(model)
    weights = checkpoint.weights_sha256(source.path)
    public = _checked(_BASE_NAME, name or source.name, "--name NAME")
    return source, Entry(public, f"{public}@{weights[:12]}", None, source.path, "", source.id)


def _adapter(path: Path, base: BaseModel, limits: Limits) -> Entry:
    checked = preflight.check(path, base, limits)
    for remark in [*checked.remarks, *quantized.remarks(path, base.path)]:
        say(f"warning: {remark}")
    name = checked_alias(checked.name, _renamed(path))
    version = f"{name}@{checked.content_id[:12]}"
    return Entry(name, version, version, checked.path, checked.content_id, base.record.id, path)


def _renamed(adapter: Path) -> str:
    """How it gets another name."""
    if artifact.is_artifact(adapter):
        return f"its artifact.json calls it so: tuneship adapters load {adapter} --alias NAME, when the server runs"
    return "rename the directory"


def _name_of(adapter: Path) -> str:
    """As preflight calls it."""
    known = artifact.read_manifest(adapter).name if artifact.is_artifact(adapter) else ""
    return known or adapter.name


def _adapters(folder: Path) -> list[Path]:
    """The adapters in `folder`, or `folder` itself if it is one: a trainer's checkpoints in it are none of ours.

    Of a run it is the one that it trained last.
    """
    if not folder.is_dir():
        raise ArtifactError(f"no directory {folder}", hint="--adapters wants an adapter, a directory of them, or a run")
    # Not resolved: a link's own name is the one that was meant.
    here = rundir.made(folder.absolute(), "train")
    if preflight.is_adapter(here):
        return [here]
    found = [path for path in sorted(here.iterdir()) if preflight.is_adapter(path)]
    if not found:
        deeper = preflight.deeper(folder)
        raise ArtifactError(
            f"no adapter in {folder}",
            hint=f"deeper in it lies {deeper}: name that, with one --adapters for each"
            if deeper
            else "an adapter is a directory with an adapter_config.json",
        )
    return found


def _all_different(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    seen: dict[str, Entry] = {}
    for entry in entries:
        if entry.name in seen:
            before = seen[entry.name]
            raise PreflightError(
                f"two models are called {entry.name!r}: {before.source or before.path} and {entry.source}",
                hint="leave one of them out, and bring it in beside the other: tuneship adapters load PATH --alias NAME"
                if before.source
                else "call the base something else with --name",
            )
        seen[entry.name] = entry
    return tuple(seen.values())


def _checked(allowed: re.Pattern[str], name: str, hint: str) -> str:
    if not allowed.fullmatch(name):
        raise PreflightError(f"{quoted(name)} cannot be the name of a served model", hint=hint)
    return name
