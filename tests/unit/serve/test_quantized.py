"""A base of fewer bits: found by what it was made of, and refused where SGLang cannot serve it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from tuneship.core import artifact, base_store, checkpoint
from tuneship.core.artifact import MANIFEST, Artifact, QuantizationRecord
from tuneship.core.base_store import Wanted
from tuneship.core.errors import ArtifactError, PreflightError
from tuneship.core.hardware import Gpu, Hardware
from tuneship.core.model_source import resolve
from tuneship.core.recipe import Serve
from tuneship.serve import catalog, quantized

CPU = Hardware((), "", "a processor", 2, 8 << 30)
H100 = Hardware((Gpu("NVIDIA H100", 80 << 30, (9, 0)),), "580", "a processor", 16, 128 << 30)
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
WANTED = Serve(quantization="nf4")
IN_16_BITS = Serve(quantization="dequantized")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESHIP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def nf4(base: Path, seal_adapter) -> Artifact:
    """An NF4 base of `base` in the cache, as far as configuration and manifest go."""
    packed = NF4 | {"bnb_4bit_use_double_quant": True}
    return put(base, seal_adapter("any"), "base-nf4", {"quantization_config": packed})


@pytest.fixture
def dequantized(base: Path, seal_adapter) -> Artifact:
    """The values of that in 16 bits, as far as configuration and manifest go."""
    return put(base, seal_adapter("any"), "base-dequantized", {})


def put(base: Path, like: Artifact, kind: artifact.Kind, config: dict[str, object]) -> Artifact:
    with artifact.draft(base_store.default_folder()) as work:
        shutil.copytree(base, work, dirs_exist_ok=True)
        (work / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | config))
        (work / "tokenizer.json").write_text('{"written": "anew"}')
        about = {
            "kind": kind,
            "name": "base",
            "input_id": Wanted(resolve(str(base)), kind=kind).input_id,
            "quantization": QuantizationRecord(method="nf4", double=True, compute_dtype="bfloat16"),
            "lora": None,
        }
        return artifact.seal(work, like.manifest.model_copy(update=about))


def changed(sealed: Artifact, **about: object) -> Path:
    """The artifact with another manifest, which is no part of its identity."""
    text = sealed.manifest.model_copy(update=about).model_dump_json(by_alias=True)
    (sealed.path / MANIFEST).write_text(text)
    return sealed.path


def other_weights(folder: Path) -> Path:
    file = folder / "model.safetensors"
    save_file({key: value + 1 for key, value in load_file(file).items()}, file)
    return folder


def trained(
    sealed: Artifact, method: str, *, double: bool, loaded_in: str = "float32", stored: str = "bfloat16"
) -> Path:
    record = QuantizationRecord(method=method, double=double, compute_dtype=loaded_in, stored_dtype=stored)
    return changed(sealed, quantization=record)


def test_the_nf4_base_of_a_model_is_found_by_what_it_was_made_of(base: Path, nf4: Artifact, tmp_path: Path):
    assert quantized.with_quantization(str(base), WANTED) == str(nf4.path)
    copy = shutil.copytree(base, tmp_path / "copy")
    assert quantized.with_quantization(str(copy), WANTED) == str(nf4.path), "another path, the same model"
    assert quantized.with_quantization(str(base), Serve()) == str(base)
    assert quantized.with_quantization(str(nf4.path), Serve()) == str(nf4.path)
    assert quantized.public_name(str(base)) == "base"


@pytest.mark.parametrize("change", ["weights", "template", "double", "damage"])
def test_another_base_is_not_taken_for_it(base: Path, nf4: Artifact, change: str):
    wanted = Wanted(resolve(str(base)))
    if change == "weights":
        other_weights(base)
    elif change == "template":
        (base / "chat_template.jinja").write_text("{{ other }}")
    elif change == "double":
        wanted = wanted._replace(double=False)
    else:
        (nf4.path / "tokenizer.json").write_text("{}")
    assert base_store.find(wanted, base_store.default_folder()) is None


def test_an_nf4_base_is_known_as_the_model_that_it_was_made_of(base: Path, nf4: Artifact):
    assert checkpoint.identify(nf4.path, "whatever", "main") == nf4.manifest.base
    assert checkpoint.tokenizer_sha256(nf4.path) == checkpoint.tokenizer_sha256(base)
    assert artifact.quantized_base(base) is None
    changed(nf4, base=nf4.manifest.base.model_copy(update={"id": str(base), "revision": ""}))
    assert base_store.original(resolve(str(nf4.path))).path == base


def test_it_is_served_under_its_originals_name(nf4: Artifact):
    found = catalog.read(str(nf4.path))
    assert (found.mode, found.weights) == ("base", "nf4")
    assert (found.base.name, found.base.version) == ("base", f"base@{nf4.id12}")
    assert (found.base.artifact_id, found.base.base_id) == (nf4.manifest.content_id, "the-base")


def test_each_kind_of_base_is_found_for_itself(base: Path, nf4: Artifact, dequantized: Artifact):
    assert quantized.with_quantization(str(base), IN_16_BITS) == str(dequantized.path)
    assert quantized.with_quantization(str(base), WANTED) == str(nf4.path)
    for settings in (IN_16_BITS, Serve()):
        assert quantized.with_quantization(str(dequantized.path), settings) == str(dequantized.path)
    shutil.rmtree(dequantized.path)
    assert base_store.find(Wanted(resolve(str(base)), kind="base-dequantized"), base_store.default_folder()) is None


def test_through_an_nf4_base_its_own_values_are_found(base: Path, nf4: Artifact, dequantized: Artifact):
    changed(nf4, base=nf4.manifest.base.model_copy(update={"id": str(base), "revision": ""}))
    wanted = quantized.to_find(str(nf4.path), IN_16_BITS, double=False)
    assert wanted == Wanted(resolve(str(base)), True, "base-dequantized", (nf4.manifest.content_id,))
    assert quantized.with_quantization(str(nf4.path), IN_16_BITS) == str(dequantized.path)


def test_a_dequantized_base_is_a_16_bit_checkpoint_of_the_model_that_it_was_made_of(
    base: Path, dequantized: Artifact, seal_adapter, capsys
):
    assert checkpoint.identify(dequantized.path, "whatever", "main") == dequantized.manifest.base
    adapter = trained(seal_adapter("sql"), "nf4", double=True)
    found = catalog.read(str(dequantized.path), adapter)
    assert (found.mode, found.weights, catalog.read(str(dequantized.path)).mode) == ("adapters", "none", "base")
    assert capsys.readouterr().err == "", "nothing to warn of"
    assert quantized.method(Serve(extra_args=("--tp", "2")), found.weights, H100) == "none", "any 16 bits can be split"


@pytest.mark.parametrize(
    ("method", "double", "same"),
    [("nf4", True, True), ("nf4", False, False), ("fp4", True, False), ("none", True, False)],
)
def test_bits_are_the_same_where_the_values_are(
    base: Path, nf4: Artifact, dequantized: Artifact, seal_adapter, method: str, double: bool, same: bool
):
    adapter = trained(seal_adapter("sql"), method, double=double)
    for served in (nf4, dequantized):
        assert quantized.same_bits(adapter, served.path, "bfloat16") is same
        assert bool(quantized.remarks(adapter, served.path)) is not same
    assert quantized.same_bits(adapter, base, "bfloat16") is (method == "none")
    assert not quantized.same_bits(base, base, "bfloat16"), "nobody knows what an adapter from elsewhere was trained on"


@pytest.mark.parametrize(
    ("stored", "loaded_in", "same"),
    [
        ("bfloat16", "bfloat16", True),
        ("bfloat16", "float32", True),
        ("bfloat16", "float16", False),  # the T4: its range is smaller
        ("float32", "float32", False),  # a base is packed of what is left of it in bfloat16
        ("float32", "bfloat16", True),
        ("", "float32", False),
    ],
)
def test_values_are_the_same_where_no_cast_has_changed_them(
    nf4: Artifact, seal_adapter, stored: str, loaded_in: str, same: bool
):
    adapter = trained(seal_adapter("sql"), "nf4", double=True, loaded_in=loaded_in, stored=stored)
    assert quantized.same_bits(adapter, nf4.path, "bfloat16") is same
    assert quantized.remarks(adapter, nf4.path) == [], "nothing that a user could do about it"


def test_values_of_16_bits_served_in_others_are_other_values(base: Path, seal_adapter):
    adapter = trained(seal_adapter("sql"), "none", double=False, loaded_in="bfloat16")
    found = {dtype: quantized.same_bits(adapter, base, dtype) for dtype in ("bfloat16", "float32", "float16")}
    assert found == {"bfloat16": True, "float32": True, "float16": False}


def test_a_dequantized_base_is_nothing_else(base: Path, dequantized: Artifact, seal_adapter):
    for other in ("nf4", "fp8"):
        with pytest.raises(PreflightError, match=f"holds the values of NF4 and cannot be served as {other}"):
            quantized.with_quantization(str(dequantized.path), Serve(quantization=other))
    with pytest.raises(PreflightError, match="with the values of NF4 it is another model"):
        quantized.with_quantization(str(seal_adapter("invoice", kind="merged").path), IN_16_BITS)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": NF4}))
    with pytest.raises(PreflightError, match=r"quantized already \(nf4\)"):
        quantized.with_quantization(str(base), IN_16_BITS)


@pytest.mark.parametrize(
    ("method", "double", "said"),
    [
        ("nf4", True, []),
        ("nf4", False, ["as NF4 without double quantization", "as NF4 with double"]),
        ("none", True, ["unquantized", "as NF4 with double quantization"]),
    ],
)
def test_an_adapter_fits_every_base_of_its_weights_and_other_bits_are_said(
    nf4: Artifact, seal_adapter, capsys, method: str, double: bool, said: list[str]
):
    adapter = trained(seal_adapter("sql"), method, double=double)
    assert [entry.name for entry in catalog.read(str(nf4.path), adapter).entries[1:]] == ["sql"]
    heard = capsys.readouterr().err
    assert bool(heard) == bool(said)
    assert all(part in heard for part in said)


def test_an_adapter_of_other_weights_does_not_fit(base: Path, nf4: Artifact, seal_adapter, tmp_path: Path):
    other = other_weights(shutil.copytree(base, tmp_path / "other"))
    adapter = trained(seal_adapter("sql", made_for=other), "nf4", double=True)
    with pytest.raises(ArtifactError, match="was trained on"):
        catalog.read(str(nf4.path), adapter)


def test_the_16_bit_base_of_an_nf4_adapter_is_no_secret(base: Path, seal_adapter):
    (remark,) = quantized.remarks(trained(seal_adapter("sql"), "nf4", double=True), base)
    assert "--quantization nf4" in remark


def test_what_was_proven_in_16_bits_is_not_packed(seal_adapter):
    with pytest.raises(PreflightError, match="proven in 16 bits"):
        quantized.with_quantization(str(seal_adapter("invoice", kind="merged").path), WANTED)


def test_packed_weights_are_not_quantized_again(nf4: Artifact):
    with pytest.raises(PreflightError, match="cannot be served as fp8"):
        quantized.with_quantization(str(nf4.path), Serve(quantization="fp8"))


@pytest.mark.parametrize(
    "words",
    [
        ["--tp-size", "2"],
        ["--tp", "2"],
        ["--tensor-parallel-size", "2"],
        ["--tp-size=2"],
        ["--tensor-parallel-size=2"],
        ["--tensor-par", "2"],
        ["--tp", "1", "--schedule-policy", "fcfs", "--tp", "2"],
    ],
    ids=" ".join,
)
def test_tensor_parallel_is_refused_in_any_spelling(words: list[str]):
    with pytest.raises(PreflightError, match="tensor parallel 2"):
        quantized.method(Serve(extra_args=tuple(words)), "nf4", H100)
    assert quantized.method(Serve(extra_args=tuple(words)), "none", H100) == "none"


def test_what_cannot_be_served_is_not_built(base: Path):
    serve = Serve(quantization="nf4", extra_args=("--tp", "2"))
    with pytest.raises(PreflightError, match="tensor parallel 2"):
        quantized.with_quantization(str(base), serve)


@pytest.mark.parametrize("words", [[], ["--tp", "1"], ["--tokenizer-mode", "2"], ["--tp", "2", "--tp-size", "1"]])
def test_other_arguments_are_not_tensor_parallel(words: list[str]):
    assert quantized.method(Serve(extra_args=tuple(words)), "nf4", H100) == "nf4"


def test_float32_of_packed_weights_is_a_cpus():
    assert quantized.method(Serve(dtype="float32"), "nf4", CPU) == "nf4"
    with pytest.raises(PreflightError, match="float32"):
        quantized.method(Serve(dtype="float32"), "nf4", H100)


def test_fp8_is_a_gpus():
    assert quantized.method(Serve(quantization="fp8"), "none", H100) == "fp8"
    with pytest.raises(PreflightError, match="quantized already"):
        quantized.method(Serve(quantization="fp8"), "awq", H100)
    with pytest.raises(PreflightError, match="needs a GPU"):
        quantized.method(Serve(quantization="fp8"), "none", CPU)


@pytest.mark.parametrize("stored", ["compressed-tensors", "awq", "gptq"])
def test_what_is_packed_otherwise_is_a_gpus(stored: str):
    assert quantized.method(Serve(), stored, H100) == "none", "SGLang reads the format itself"
    with pytest.raises(PreflightError, match=f"{stored}, and SGLang's kernels"):
        quantized.method(Serve(), stored, CPU)
