"""Write a base once as it is quantized while training, packed into NF4 or with the values of that in 16 bits.

Of bfloat16 weights, which nearly all checkpoints have, the packed one is bit for bit the base that a QLoRA adapter is
trained on: the same function loads both. The other has what bitsandbytes computes with in place of it, streamed tensor
by tensor as a merge is (`merging/dequantized.py`); SGLang serves it as any 16-bit checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from tuneship.core import artifact as artifacts
from tuneship.core import base_store, checkpoint, hardware
from tuneship.core.artifact import Artifact, Kind, Manifest
from tuneship.core.base_store import Wanted
from tuneship.core.errors import ArtifactError
from tuneship.core.files import sha256_text
from tuneship.core.progress import say
from tuneship.core.recipe import Model, Quantization
from tuneship.core.stage import Job
from tuneship.train import fetch
from tuneship.train.model import load_base

DTYPE = "bfloat16"
"""Of what is not packed, and of the packed weights' arithmetic. SGLang computes 4-bit layers in it; and written alike
everywhere, a base has the same content id wherever it is built."""
_SHARD = "5GB"


def build(
    model_id: str,
    revision: str,
    out: Path,
    *,
    kind: Kind = base_store.NF4,
    double: bool = True,
    trust_remote_code: bool = False,
) -> Artifact:
    """The base of `kind` of `model_id` in `out`: the one that lies there, or a new one, whole or not at all.

    A dequantized one may be asked for through an NF4 base, which then says whether its scales are `double` and is its
    parent.

    Raises:
        ArtifactError: no such model, one that is packed or an adapter already, or one that cannot be loaded.

    """
    wanted = base_store.want(fetch.fetch(model_id, revision), kind, double=double)
    _refuse_what_is_no_16_bit_model(wanted.source.path, model_id)
    there = base_store.find(wanted, out)
    if there:
        say(f"base: unchanged, {there.path.name}")
        return there
    model = Model(id=wanted.source.id, dtype=DTYPE, trust_remote_code=trust_remote_code)
    tokenizer = AutoTokenizer.from_pretrained(wanted.source.path, trust_remote_code=trust_remote_code)
    with artifacts.draft(out) as work:
        if kind == base_store.NF4:
            _pack(wanted, model, tokenizer, work)
        else:
            _dequantize(wanted, model, tokenizer, work)
        return artifacts.seal(work, _manifest(wanted))


def build_for(job: Job) -> Path:
    """`build` as a stage: of `inputs["model"]` at `inputs["revision"]`, as `inputs["quantization"]`, into `out`."""
    wanted = job.inputs
    kind = base_store.KINDS[wanted["quantization"]]
    double = wanted["double"] == "True"
    return build(wanted["model"], wanted["revision"], Path(wanted["out"]), kind=kind, double=double).path


def _pack(wanted: Wanted, model: Model, tokenizer: Any, out: Path) -> None:
    say(f"packing {wanted.source.name} into 4 bits")
    base = load_base(wanted.source.path, model, Quantization(double=wanted.double))
    base.config.use_cache = True
    base.save_pretrained(out, max_shard_size=_SHARD)
    tokenizer.save_pretrained(out)


def _dequantize(wanted: Wanted, model: Model, tokenizer: Any, out: Path) -> None:
    from tuneship.train.merging import dequantized  # noqa: PLC0415 - packing needs nothing of merging

    say(f"writing what 4 bits of {wanted.source.name} stand for")
    dequantized.write(wanted.source.path, model, tokenizer, out, double=wanted.double)


def _refuse_what_is_no_16_bit_model(path: Path, model_id: str) -> None:
    if artifacts.is_artifact(path) and artifacts.read_manifest(path).kind == "adapter":
        raise ArtifactError(f"{model_id} is an adapter, not a model")
    packed = checkpoint.read_config(path).get("quantization_config")
    if packed:
        raise ArtifactError(
            f"{model_id} is quantized already ({packed.get('quant_method')})",
            hint="build from the 16-bit model; a quantized one is served as it is",
        )


def _manifest(wanted: Wanted) -> Manifest:
    source, template = wanted.source, checkpoint.chat_template(wanted.source.path)
    return Manifest(
        kind=wanted.kind,
        name=source.name,
        input_id=wanted.input_id,
        parents=wanted.parents,
        base=checkpoint.identify(source.path, source.id, source.revision),
        quantization=artifacts.QuantizationRecord(method="nf4", double=wanted.double, compute_dtype=DTYPE),
        template=artifacts.TemplateRecord(text=template, sha256=sha256_text(template), source="model"),
        end_token_ids=tuple(checkpoint.end_token_ids(source.path)),
        tokenizer_sha256=checkpoint.tokenizer_sha256(source.path),
        versions=hardware.versions(),
        hardware=hardware.detect().as_record(),
    )
