"""The NF4 base on disk, packed or dequantized: what training loads, bit for bit, and the same at every build."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tuneship.cli.app import app
from tuneship.core.artifact import Artifact, open_artifact
from tuneship.core.errors import ArtifactError
from tuneship.core.recipe import Model, Quantization
from tuneship.train.commands import build_base


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESHIP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def nf4(tiny_model: Path, tmp_path_factory) -> Artifact:
    from tuneship.train.base import build

    return build(str(tiny_model), "main", tmp_path_factory.mktemp("bases"))


def test_it_is_what_training_loads(nf4: Artifact, tiny_model: Path):
    import torch

    from tuneship.train.model import load_base

    model = Model(id="tiny", dtype="bfloat16")
    trained_on = load_base(tiny_model, model, Quantization()).state_dict()
    written = load_base(nf4.path, model, Quantization()).state_dict()
    assert sum("quant_state" in key for key in written) == 14
    assert written.keys() == trained_on.keys()
    for key, tensor in written.items():
        assert torch.equal(tensor, trained_on[key]), key


def test_every_build_is_the_same(nf4: Artifact, tiny_model: Path, tmp_path: Path):
    from tuneship.train.base import build

    again = build(str(tiny_model), "main", tmp_path)
    assert again.manifest.content_id == nf4.manifest.content_id
    assert build(str(tiny_model), "main", tmp_path) == again
    assert build(str(tiny_model), "main", tmp_path, double=False).manifest.content_id != nf4.manifest.content_id


def test_its_manifest_says_what_it_was_made_of(nf4: Artifact, tiny_model: Path):
    manifest = nf4.manifest
    assert nf4.path.name == f"base-nf4-{nf4.id12}"
    assert (manifest.base.id, manifest.name, manifest.end_token_ids) == (str(tiny_model), tiny_model.name, (2,))
    assert (manifest.quantization.method, manifest.quantization.double) == ("nf4", True)
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= manifest.files.keys()


def test_it_is_loaded_as_it_was_written_or_not_at_all(nf4: Artifact):
    from tuneship.train.model import load_base

    model = Model(id="tiny", dtype="bfloat16")
    with pytest.raises(ArtifactError, match="double = true"):
        load_base(nf4.path, model, Quantization(double=False))
    with pytest.raises(ArtifactError, match="no 16-bit weights"):
        load_base(nf4.path, model)


def test_what_is_packed_is_not_packed_again(nf4: Artifact, tmp_path: Path):
    with pytest.raises(ArtifactError, match="quantized already"):
        build_base(str(nf4.path), out=tmp_path)


@pytest.fixture(scope="module", params=[True, False], ids=["double", "single"])
def dequantized(tiny_model: Path, tmp_path_factory, request) -> Artifact:
    from tuneship.train.base import build

    out = tmp_path_factory.mktemp("bases")
    return build(str(tiny_model), "main", out, kind="base-dequantized", double=request.param)


@pytest.mark.parametrize("options", [["--no-double"], ["--quantization", "dequantized", "--no-double"]])
def test_what_is_said_of_a_damaged_one_makes_it_again(tiny_model: Path, tmp_path: Path, options: list[str], capsys):
    """Without each option it would be another base, and the damaged one would stay."""
    app(["base", "build", str(tiny_model), *options, "--out", str(tmp_path)], result_action="return_value")
    built = Path(capsys.readouterr().out.strip())
    (built / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ArtifactError) as caught:
        open_artifact(built)
    command = shlex.split(caught.value.hint.split("`")[1])
    app(command[1:], result_action="return_value")
    assert open_artifact(built).path == built
    assert [path.name for path in tmp_path.iterdir()] == [built.name]


def test_dequantized_it_has_the_values_that_the_nf4_base_stands_for(dequantized, tiny_model: Path, tmp_path: Path):
    import torch
    from transformers import AutoModelForCausalLM

    from tuneship.train.base import build

    double = dequantized.manifest.quantization.double
    packed = AutoModelForCausalLM.from_pretrained(build(str(tiny_model), "main", tmp_path, double=double).path)
    wanted = packed.dequantize().state_dict()
    written = AutoModelForCausalLM.from_pretrained(dequantized.path, dtype="auto").state_dict()
    original = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).state_dict()
    assert written.keys() == wanted.keys()
    for key, tensor in written.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, wanted[key].to(tensor)), key
    assert sum(not torch.equal(written[key], original[key]) for key in written) == 14, "not the packed layers alone"


def test_dequantized_it_is_found_again_and_says_what_it_is(dequantized: Artifact, tiny_model: Path):
    from tuneship.train.base import build

    manifest, folder = dequantized.manifest, dequantized.path.parent
    assert dequantized.path.name == f"base-dequantized-{dequantized.id12}"
    assert (manifest.base.id, manifest.quantization.method, manifest.parents) == (str(tiny_model), "nf4", ())
    again = build(str(tiny_model), "main", folder, kind="base-dequantized", double=manifest.quantization.double)
    assert again == dequantized
    assert [path.name for path in folder.iterdir()] == [dequantized.path.name]


def test_through_an_nf4_base_it_has_that_as_its_parent(nf4: Artifact, tiny_model: Path, tmp_path: Path):
    from tuneship.train.base import build

    through = build(str(nf4.path), "main", tmp_path, kind="base-dequantized", double=False)
    assert through.manifest.parents == (nf4.manifest.content_id,)
    assert (through.manifest.base, through.manifest.quantization) == (nf4.manifest.base, nf4.manifest.quantization)
    direct = build(str(tiny_model), "main", tmp_path / "direct", kind="base-dequantized")
    assert through.manifest.content_id == direct.manifest.content_id


def test_a_build_that_breaks_off_leaves_nothing(tiny_model: Path, tmp_path: Path, monkeypatch):
    from tuneship.train.base import build
    from tuneship.train.merging import four_bit

    calls, real = [], four_bit.there_and_back

    def breaks(*args, **options):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(four_bit, "there_and_back", breaks)
    with pytest.raises(KeyboardInterrupt):
        build(str(tiny_model), "main", tmp_path, kind="base-dequantized")
    assert list(tmp_path.iterdir()) == []


def test_a_dequantized_base_is_not_trained_on(dequantized: Artifact):
    from tuneship.train.model import load_base

    for quantization in (Quantization(), None):
        with pytest.raises(ArtifactError, match="is for serving"):
            load_base(dequantized.path, Model(id="tiny", dtype="bfloat16"), quantization)


def test_there_is_no_fp8_base_to_build():
    with pytest.raises(ArtifactError, match="while it loads") as caught:
        build_base("org/base", quantization="fp8")
    assert caught.value.hint == "tuneship serve org/base --quantization fp8"
