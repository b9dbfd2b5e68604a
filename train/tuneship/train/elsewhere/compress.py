"""A merged checkpoint in fewer bits, made by llm-compressor: FP8 (W8A8, dynamic) or W4A16 (GPTQ, calibrated).

llm-compressor wants other versions of libraries than SGLang and the trainer here, so it has an environment of its own.
What it writes is compressed-tensors' format, which transformers (for parity) and SGLang (on a GPU) both load.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from tuneship.core.errors import ArtifactError
from tuneship.train.elsewhere import own_environment
from tuneship.train.merging import shards
from tuneship.train.merging.changes import Skeleton

Scheme = Literal["fp8", "w4a16"]

REQUIREMENTS = ("llmcompressor==0.13.0", "torch==2.11.0", "transformers==5.12.1")
CALIBRATION_ROWS = 256
_GROUPS = (128, 64, 32)
"""Values of a row that share a scale, as SGLang's kernels have them; the first that divides every row."""
_PROGRAM = Path(__file__).with_name("llm_compressor.py")
_TAKEN = ("config.json", "*.safetensors", shards.INDEX)
"""What is taken of what it writes; tokenizer, template and end of turn are those of the merge."""


def compress(
    model: Path, scheme: Scheme, names: Skeleton, rows: Sequence[Sequence[int]], work: Path, log: Path
) -> Path:
    """Write the checkpoint at `model` in fewer bits to a folder in `work`; `rows` are token ids to calibrate with.

    Raises:
        ArtifactError: rows that no group size divides, or no compressed-tensors to read it again with.
        TrainError: llm-compressor cannot be installed, or failed.

    """
    if find_spec("compressed_tensors") is None:
        raise ArtifactError(
            f"merge.quantize = '{scheme}' is measured with compressed-tensors, which is not installed",
            hint="pip install 'tuneship[compress]'",
        )
    out = work / scheme
    job = {
        "model": str(model),
        "out": str(out),
        "scheme": scheme,
        "group": _group(model, names) if scheme == "w4a16" else 0,
        "head": names.head.removesuffix(".weight"),
        "rows": [list(row) for row in rows[:CALIBRATION_ROWS]],
    }
    (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
    interpreter = own_environment.python("llm-compressor", REQUIREMENTS, extra="compress")
    own_environment.run(interpreter, _PROGRAM, str(work / "job.json"), log=log, env={"HF_HUB_OFFLINE": "1"})
    return out


def replace_weights(folder: Path, compressed: Path) -> None:
    """Put what `compress` wrote in the place of the 16-bit weights in `folder`."""
    for where, move in ((folder, Path.unlink), (compressed, lambda file: file.rename(folder / file.name))):
        for file in _files(where):
            move(file)


def _files(folder: Path) -> list[Path]:
    return [file for pattern in _TAKEN for file in folder.glob(pattern)]


def _group(model: Path, names: Skeleton) -> int:
    slots: dict[str, Any] = shards.of_checkpoint(model).slots
    widths = {slots[key].shape[1] for key in names.packed}
    for group in _GROUPS:
        if all(width % group == 0 for width in widths):
            return group
    raise ArtifactError(
        f"rows of {sorted(widths)} values have no common group of {' or '.join(map(str, _GROUPS))} for 4 bits",
        hint="merge.quantize = 'fp8'",
    )
