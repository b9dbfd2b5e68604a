"""Write a base once as it is quantized while training: a pre-quantized checkpoint that SGLang serves.

Of bfloat16 weights, which nearly all checkpoints have, it is bit for bit the base that a QLoRA adapter is trained on:
the same function loads both.
"""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from tuneship.core import artifact as artifacts
from tuneship.core import base_store, checkpoint, hardware
from tuneship.core.artifact import Artifact, Manifest
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


def build(model_id: str, revision: str, out: Path, *, double: bool = True, trust_remote_code: bool = False) -> Artifact:
    """The NF4 base of `model_id` in `out`: the one that lies there, or a new one.

    Raises:
        ArtifactError: no such model, one that is packed or an adapter already, or one that cannot be loaded.

    """
    wanted = Wanted(fetch.fetch(model_id, revision), double)
    _refuse_what_is_no_16_bit_model(wanted.source.path, model_id)
    there = base_store.find(wanted, out)
    if there:
        say(f"base: unchanged, {there.path.name}")
        return there
    source = wanted.source
    say(f"packing {source.name} into 4 bits")
    model = Model(id=source.id, dtype=DTYPE, trust_remote_code=trust_remote_code)
    base = load_base(source.path, model, Quantization(double=double))
    base.config.use_cache = True
    with artifacts.draft(out) as work:
        base.save_pretrained(work, max_shard_size=_SHARD)
        AutoTokenizer.from_pretrained(source.path, trust_remote_code=trust_remote_code).save_pretrained(work)
        return artifacts.seal(work, _manifest(wanted))


def build_for(job: Job) -> Path:
    """`build` as a stage: of `inputs["model"]` at `inputs["revision"]`, into `inputs["out"]`."""
    wanted = job.inputs
    return build(wanted["model"], wanted["revision"], Path(wanted["out"]), double=wanted["double"] == "True").path


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
        kind=base_store.KIND,
        name=source.name,
        input_id=wanted.input_id,
        base=checkpoint.identify(source.path, source.id, source.revision),
        quantization=artifacts.QuantizationRecord(method="nf4", double=wanted.double, compute_dtype=DTYPE),
        template=artifacts.TemplateRecord(text=template, sha256=sha256_text(template), source="model"),
        end_token_ids=tuple(checkpoint.end_token_ids(source.path)),
        tokenizer_sha256=checkpoint.tokenizer_sha256(source.path),
        versions=hardware.versions(),
        hardware=hardware.detect().as_record(),
    )
