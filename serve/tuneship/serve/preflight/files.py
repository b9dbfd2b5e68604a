"""The files of an adapter's directory: which ones would be read, by whom, and whether they are what they seem."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from tuneship.core.checkpoint import TEMPLATE_FILE
from tuneship.core.errors import ArtifactError, PreflightError
from tuneship.core.quoting import on_one_line
from tuneship.core.servable import REEXPORT, Reason

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")
TEMPLATE = (TEMPLATE_FILE, "tokenizer_config.json")

_LARGEST_BYTES = {**dict.fromkeys(TOKENIZER, 1 << 27), **dict.fromkeys(TEMPLATE, 1 << 24)}
"""{file beside the weights: what is read into memory of it at most}. 49,152 tokens make a tokenizer.json of 3.5 MB."""
_SHARDS = "model.safetensors.index.json"
"""SGLang takes the names of the weight files from it, whatever else is there."""
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_CONVERT = (
    "convert it where you trust it: AutoPeftModelForCausalLM.from_pretrained(DIRECTORY).save_pretrained(DIRECTORY), "
    "which writes safetensors"
)


class Files(NamedTuple):
    """The two files that make an adapter, and what is wrong with the directory around them."""

    config: Path
    weights: Path
    reasons: list[Reason]


def find(folder: Path) -> Files:
    """The adapter's files in `folder`.

    Raises:
        ArtifactError: there is no such directory; one of the two is not there, or is no file; or one of the tokenizer
            is far too large.
        PreflightError: its weights are pickled, or one of its files lies outside the directory.

    """
    if not folder.is_dir():
        raise ArtifactError(
            f"{folder} is a file" if folder.exists() else f"there is no {folder} on the server's machine",
            hint=f"an adapter is a directory with {CONFIG} and {WEIGHTS}, such as runs/NAME/artifacts/adapter-ID; "
            "runs/NAME itself stands for the adapter that it trained last",
        )
    for name in (CONFIG, WEIGHTS, *TOKENIZER, *TEMPLATE):
        refuse_strangers(folder, folder / name)
    for name, most in _LARGEST_BYTES.items():
        _refuse_large(folder / name, most)
    if not (folder / CONFIG).is_file():
        inside = deeper(folder)
        raise ArtifactError(
            f"{folder} has no {CONFIG}", hint=f"the adapter in it is {inside}: name that" if inside else REEXPORT
        )
    if not (folder / WEIGHTS).is_file():
        _refuse_pickles(folder)
        raise ArtifactError(f"{folder} has no {WEIGHTS}", hint=f"{REEXPORT}, safe_serialization=True")
    return Files(folder / CONFIG, folder / WEIGHTS, _beside(folder))


def deeper(folder: Path) -> Path | None:
    """The first adapter of a run, or of all runs: whoever names their folder means what lies in it."""
    for depth in ("*", "*/*", "*/*/*"):
        for config in sorted(folder.glob(f"{depth}/{CONFIG}")):
            return config.parent
    return None


def refuse_strangers(folder: Path, file: Path) -> None:
    """A link may stay in the directory, or lead to the blobs of the hub cache that the directory is part of.

    Anything else could show a stranger's adapter what lies elsewhere on this disk.

    Raises:
        PreflightError: `file`, which is looked for in `folder`, lies outside.
        ArtifactError: it is there, and no file.

    """
    if not _is_there(file):
        return
    home, target = (Path(os.path.realpath(path)) for path in (folder, file))  # links to themselves are resolved, too
    snapshots = next((parent for parent in home.parents if parent.name == "snapshots"), None)
    if not target.is_relative_to(home) and not (snapshots and target.parent == snapshots.parent / "blobs"):
        raise PreflightError(
            f"adapter {folder.name!r}: {file.name} is a link that leaves its directory",
            hint="put the file itself there",
        )
    if not file.is_file():
        raise ArtifactError(f"{file} is not a file", hint=REEXPORT)


def _refuse_large(file: Path, most: int) -> None:
    size = file.stat().st_size if file.is_file() else 0
    if size > most:
        raise ArtifactError(
            f"{file} has {size} bytes, and at most {most} are read",
            hint="save the tokenizer again; if it was not used in training, delete it from its directory",
        )


def _refuse_pickles(folder: Path) -> None:
    pickled = sorted(file.name for file in folder.iterdir() if _holds_weights(file))
    if pickled:
        listed = on_one_line(", ".join(pickled))
        raise PreflightError(
            f"adapter {folder.name!r} has its weights pickled, in {listed}: reading them can run any code",
            hint=_CONVERT,
        )


def _holds_weights(file: Path) -> bool:
    """Whether it may be an adapter's weights, not the optimizer's or scheduler's state that trainers leave there."""
    return file.suffix in _PICKLED and not file.name.startswith(
        ("optimizer", "scheduler", "scaler", "rng_state", "training_args")
    )


def _beside(folder: Path) -> list[Reason]:
    """What SGLang would read together with the weights, or in their place."""
    others = sorted(file.name for file in folder.glob("[!.]*.safetensors") if file.name != WEIGHTS)
    reasons = []
    if others:
        reasons.append(
            Reason(
                f"has other weights beside {WEIGHTS}, which SGLang would load too: {', '.join(others)}",
                "leave only the adapter in its directory",
            )
        )
    if _is_there(folder / _SHARDS):
        reasons.append(
            Reason(f"has a {_SHARDS}, which tells SGLang to load other files", f"remove {_SHARDS} from its directory")
        )
    return reasons


def _is_there(file: Path) -> bool:
    """Links that lead nowhere are there too."""
    return file.exists() or file.is_symlink()
