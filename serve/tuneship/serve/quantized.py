"""Serving a base of fewer bits: which base that is, what an engine makes of it, and what is refused before it starts.

    model = with_quantization("org/base", Serve(quantization="nf4"))  # its NF4 base's folder, built if need be
    weights(Path(model))  # QuantizationRecord(method="nf4", double=True, ...)
    same_bits(adapter, Path(model), "bfloat16")  # the adapter was trained on these values

The rule of docs/decisions/0009-an-nf4-base-is-an-artifact.md: an adapter fits every base made of the weights that it
was trained on, and `remarks` says so when their bits are not those that it was trained on. Where NF4's values lie in 16
bits (0017-nf4-values-in-16-bits.md) they are the bits of an adapter that was trained on NF4.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

from tuneship.core import artifact, base_store, checkpoint, hardware, model_source
from tuneship.core.artifact import Kind, Manifest, QuantizationRecord
from tuneship.core.base_store import Wanted
from tuneship.core.cache import cache_dir
from tuneship.core.errors import PreflightError
from tuneship.core.hardware import Hardware
from tuneship.core.progress import say
from tuneship.core.quoting import on_one_line, quoted
from tuneship.core.recipe import Serve
from tuneship.core.stage import Job, run_job
from tuneship.serve import startable

Method = Literal["none", "nf4", "fp8"]
"""What an engine is told: nothing, that the weights are packed, or to quantize while it loads."""

_BITSANDBYTES = "bitsandbytes"
_HOLDS: Mapping[Kind, str] = {base_store.NF4: "is NF4", base_store.DEQUANTIZED: "holds the values of NF4"}
_AS: Mapping[Kind, str] = {base_store.NF4: "as NF4", base_store.DEQUANTIZED: "with the values of NF4"}
# SGLang's argparse takes any unambiguous beginning of an option for it.
_TENSOR_PARALLEL = ("--tp", "--te")


def with_quantization(model: str, serve: Serve, *, double: bool = True) -> str:
    """The model to serve when `model` is wanted with `serve.quantization`: a base of that kind, built if need be.

    `double` is whether an NF4 base's scales shall be quantized too, or are in the values of a dequantized one.

    Raises:
        ArtifactError: no such model, or it cannot be packed.
        PreflightError: as `to_find`, or SGLang cannot be started so here, whatever the model.

    """
    startable.require(serve, hardware.detect())  # before minutes of building
    wanted = to_find(model, serve, double=double)
    return str(_find_or_build(model, serve.quantization, wanted)) if wanted else model


def to_find(model: str, serve: Serve, *, double: bool = True) -> Wanted | None:
    """The base that is served in place of `model`; None where that is served itself. Nothing is built.

    Raises:
        ArtifactError: no such model.
        PreflightError: a merged model, a base in another quantization, or what SGLang cannot do with one.

    """
    path, quantization = Path(model), serve.quantization
    ours = artifact.quantized_base(path)
    kind = base_store.KINDS.get(quantization)
    if ours and quantization != "none" and ours.kind != kind and not _dequantizes(ours, kind):
        raise PreflightError(
            f"{path.name} {_HOLDS[ours.kind]} and cannot be served as {quantization}", hint="serve its original"
        )
    if kind is None or (ours and ours.kind == kind):
        return None
    if artifact.is_artifact(path) and not ours:
        raise PreflightError(
            f"{path.name} was proven in 16 bits, and {_AS[kind]} it is another model",
            hint=f"serve its base with --quantization {quantization} and its adapter with --adapters",
        )
    if kind == base_store.NF4:
        _refuse_for_nf4(serve, hardware.detect())  # before minutes of building
    source = model_source.resolve(model)
    stored = weights(source.path).method
    if stored == "nf4" and kind == base_store.NF4:
        return None
    if stored != "none" and not ours:
        raise PreflightError(
            f"the model is quantized already ({stored})", hint="leave --quantization out, or serve its original"
        )
    return base_store.want(source, kind, double=double)


def public_name(model: str) -> str:
    """What clients call `model` unless told otherwise, whoever packed it; empty where an artifact says so itself."""
    return "" if artifact.is_artifact(Path(model)) else model_source.resolve(model).name


def weights(path: Path) -> QuantizationRecord:
    """How the checkpoint at `path` holds its linear layers, by its own configuration; `none`: in 16 bits or more."""
    packed = checkpoint.read_config(path).get("quantization_config") or {}
    method = on_one_line(str(packed.get("quant_method") or "none"))
    if method == _BITSANDBYTES and packed.get("load_in_4bit"):
        method = on_one_line(str(packed.get("bnb_4bit_quant_type")))
    return QuantizationRecord(
        method=method,
        double=bool(packed.get("bnb_4bit_use_double_quant")),
        compute_dtype=str(packed.get("bnb_4bit_compute_dtype") or ""),
    )


def values(base: Path) -> QuantizationRecord:
    """On which values the linear layers of the checkpoint at `base` lie, in however many bits."""
    ours = artifact.quantized_base(base)
    return ours.quantization if ours else weights(base)


def same_bits(adapter: Path, base: Path, dtype: str) -> bool:
    """Whether it is known that `adapter` was trained on the values that `base` has when it is served in `dtype`."""
    if not artifact.is_artifact(adapter):
        return False
    trained, held = artifact.read_manifest(adapter).quantization, values(base)
    cast_to = dtype if held.method == "none" else held.compute_dtype
    exact = all(_holds(cast, trained.stored_dtype) for cast in (trained.compute_dtype, cast_to))
    return _bits(trained) == _bits(held) and (exact or trained.compute_dtype == cast_to)


def remarks(adapter: Path, base: Path) -> list[str]:
    """What to say when `adapter` was trained on other bits of the same weights than `base` holds."""
    if not artifact.is_artifact(adapter):
        return []  # what comes from elsewhere was trained on nobody knows what
    manifest, served = artifact.read_manifest(adapter), values(base)
    trained = manifest.quantization
    if _bits(trained) == _bits(served):
        return []
    fix = ""
    if trained.method == "nf4" and served.method == "none":
        fix = " (--quantization nf4 serves that, and dequantized the same in 16 bits)"
    name, base_id = quoted(manifest.name or adapter.name), on_one_line(manifest.base.id)
    was = f"adapter {name} was trained on {base_id} {_bits(trained)}{fix}"
    return [f"{was} and is served on it {_bits(served)}: its answers can differ from those that training measured"]


def method(serve: Serve, weights_method: str, machine: Hardware) -> Method:
    """What the engine is told for a checkpoint of `weights_method`.

    Raises:
        PreflightError: it cannot be served so here; the message says why.

    """
    startable.require(serve, machine)
    if weights_method == "nf4":
        _refuse_for_nf4(serve, machine)
        return "nf4"
    if weights_method != "none" and not machine.gpus:
        raise PreflightError(
            f"the model's weights are {weights_method}, and SGLang's kernels for that need a GPU",
            hint="serve its original; --quantization nf4 runs on a CPU",
        )
    if serve.quantization == "fp8":
        if weights_method != "none":
            raise PreflightError(f"the model is quantized already ({weights_method})", hint="leave --quantization out")
        if not machine.gpus:
            raise PreflightError(
                "--quantization fp8 needs a GPU: SGLang's FP8 kernels are Triton's and CUDA's",
                hint="--quantization nf4 runs on a CPU",
            )
        return "fp8"
    return "none"


def _refuse_for_nf4(serve: Serve, machine: Hardware) -> None:
    parallel = tensor_parallel(serve.extra_args)
    if parallel != "1":
        raise PreflightError(
            f"an NF4 base cannot be split over GPUs (tensor parallel {parallel}): each packed block of weights has one "
            "scale, and SGLang does not cut through them",
            hint="serve it on one GPU, or the 16-bit base on several",
        )
    if serve.dtype == "float32" and machine.gpus:
        raise PreflightError(
            "an NF4 base cannot be served in float32 on a GPU: SGLang computes 4-bit layers in 16 bits",
            hint="leave --dtype out",
        )


def tensor_parallel(extra_args: Sequence[str]) -> str:
    """The last tensor-parallel size in SGLang's arguments, in any spelling; `1` where there is none."""
    size = "1"
    for word, following in pairwise([*extra_args, ""]):
        name, given, value = word.partition("=")
        if name.startswith(_TENSOR_PARALLEL):
            size = value if given else following
    return size


def _holds(dtype: str, stored: str) -> bool:
    """Whether every number of `stored` is one of `dtype`."""
    return bool(stored) and dtype in (stored, "float32")


def _bits(record: QuantizationRecord) -> str:
    """In words, alike exactly when the numbers are: what they are computed in is the engine's own choice."""
    if record.method == "none":
        return "unquantized"
    return f"as {on_one_line(record.method.upper())} {'with' if record.double else 'without'} double quantization"


def _dequantizes(ours: Manifest, kind: Kind | None) -> bool:
    return ours.kind == base_store.NF4 and kind == base_store.DEQUANTIZED


def _find_or_build(model: str, quantization: str, wanted: Wanted) -> Path:
    """The base in the cache; a process of the train stage writes it, of `model`, when there is none."""
    folder = base_store.default_folder()
    there = base_store.find(wanted, folder)
    if there:
        return there.path
    source = model_source.resolve(model)
    what = "NF4" if wanted.kind == base_store.NF4 else "dequantized NF4"
    say(f"there is no {what} base of {wanted.source.id} yet: building it, once")
    logs = cache_dir() / "logs"
    logs.mkdir(exist_ok=True)
    attempt = Path(tempfile.mkdtemp(dir=logs, prefix="base-"))
    inputs = {
        "model": source.id,
        "revision": source.revision,
        "out": str(folder),
        "double": str(wanted.double),
        "quantization": quantization,
    }
    job = Job(stage="base", input_id=wanted.input_id, run_path=attempt, attempt=attempt, inputs=inputs)
    return run_job(job, "tuneship.train")
