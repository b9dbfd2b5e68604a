"""What the files of an adapter or a base say is repeated on one line that prints and ends, whoever wrote them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tuneship.core.artifact import MANIFEST, Artifact
from tuneship.core.errors import ArtifactError, PlanError, PreflightError
from tuneship.core.model_source import ModelSource
from tuneship.core.recipe import Serve
from tuneship.serve import catalog, engine_adapters, footprint, packed, quantized, state, tensors
from tuneship.serve.preflight import CheckedAdapter, Limits, named, proof
from tuneship.serve.preflight.apart import Checker
from tuneship.serve.registry import State, Version

FORGED = "m\nwarning: all is well\x1b[2J\u202e" + "x" * 100_000
CHECKED = CheckedAdapter(FORGED, "0" * 64, Path("/nowhere"))


def is_one_line(text: str) -> None:
    assert "\\x1b[2J" in text
    assert text.isprintable()
    assert len(text) < 10_000


def forge(sealed: Artifact, **about: object) -> Path:
    """The artifact with another manifest, which is no part of its identity."""
    text = json.dumps(json.loads((sealed.path / MANIFEST).read_text()) | about)
    (sealed.path / MANIFEST).write_text(text)
    return sealed.path


@pytest.mark.parametrize("body", [FORGED, json.dumps({"error_message": FORGED}), json.dumps({"message": FORGED})])
def test_what_the_engine_says_of_an_adapter(body: str):
    is_one_line(engine_adapters._message(body.encode()))


@pytest.mark.parametrize(
    "header",
    [
        {"x": {"dtype": FORGED, "shape": [1], "data_offsets": [0, 4]}},
        {FORGED: {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
    ],
    ids=["dtype", "key"],
)
def test_a_header(tmp_path: Path, header: dict):
    file = tmp_path / "x.safetensors"
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ArtifactError, match="truncated, or not safetensors") as caught:
        tensors.headers(file)
    is_one_line(caught.value.message)


def test_an_artifacts_name(base: Path, seal_adapter):
    with pytest.raises(PreflightError, match="cannot be the name") as caught:
        catalog.read(str(base), forge(seal_adapter("sql"), name=FORGED))
    is_one_line(caught.value.message)
    with pytest.raises(PreflightError, match="cannot be the name") as caught:
        catalog.checked_alias("x" * 256)
    assert catalog.checked_alias("x" * 255) == "x" * 255


async def test_an_adapter_that_is_checked_elsewhere(base: Path, tmp_path: Path):
    checker = Checker(ModelSource("the-base", "", base), Limits())
    try:
        with pytest.raises(PreflightError, match="could not be checked within 0 s") as late:
            await checker.prove(CHECKED, tmp_path, timeout_s=0)
        with pytest.raises(PreflightError, match="ended the process") as ended:
            await checker.prove(CHECKED._replace(path=None), tmp_path)  # type: ignore[arg-type] - it cannot be asked
    finally:
        checker.stop()
    is_one_line(late.value.message)
    is_one_line(ended.value.message)


def test_one_that_was_changed():
    is_one_line(proof.changed(CHECKED).message)


def test_how_a_base_was_quantized(base: Path, seal_adapter):
    record = {"method": FORGED, "double": True, "compute_dtype": ""}
    (remark,) = quantized.remarks(forge(seal_adapter("sql"), quantization=record), base)
    is_one_line(remark.replace("\\X1B[2J", "\\x1b[2J"))


def test_how_a_base_is_quantized(base: Path):
    for packed_as in ({"quant_method": FORGED}, {"quant_method": "bitsandbytes", "load_in_4bit": True}):
        packed_as.setdefault("bnb_4bit_quant_type", FORGED)
        (base / "config.json").write_text(json.dumps({"quantization_config": packed_as}))
        with pytest.raises(PreflightError, match="the model is quantized already") as caught:
            quantized.to_find(str(base), Serve(quantization="nf4"))
        is_one_line(caught.value.message)


def test_a_layer_of_a_packed_base():
    with pytest.raises(PreflightError, match="SGLang's kernels for packed weights") as caught:
        packed.require({f"{FORGED}.down_proj": (3, 3)})
    is_one_line(caught.value.message)


def test_a_layer_of_another_kind(tmp_path: Path):
    with pytest.raises(PlanError, match="cannot be planned") as caught:
        footprint._refuse_other_pools({"layer_types": [FORGED]}, tmp_path)
    is_one_line(caught.value.message)


def test_a_module_of_a_copy(make_adapter):
    def add(found: dict[str, np.ndarray]) -> None:
        found[f"model.layers.0.{FORGED}.lora_A.weight"] = np.ones((4, 8), np.float32)

    path = make_adapter("sql", change=add)
    version = Version("sql", "a" * 64, "b", path, State.LIVE, 1.0, 1, False, "", "")
    (reason,) = state._beyond(version, Limits())
    is_one_line(reason.fact)


def test_a_base_that_names_itself(facts):
    base = facts._replace(record=facts.record.model_copy(update={"id": FORGED}))
    (remark,) = named.remarks("sql", {"base_model_name_or_path": "other-org/model"}, base)
    is_one_line(remark)
