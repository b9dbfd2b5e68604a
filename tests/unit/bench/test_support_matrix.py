"""The page of what can be served is made of the machines' files, and says what nobody has run."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
STUDIES = ROOT / "bench" / "studies"


@pytest.fixture(scope="module")
def page():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(STUDIES)
        yield importlib.import_module("support_page")


@pytest.fixture(scope="module")
def study(page):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(STUDIES)
        yield importlib.import_module("support_matrix")


@pytest.fixture
def machine(page):
    """Factory (GPU, rows) -> one machine's file."""

    def make(gpu: str, *rows):
        about = {"gpu": gpu, "cpu": "c", "cores": 2, "driver": "", "memory_bytes": 1}
        return page.Machine(machine=about, versions={"sglang": "0.5.17"}, model="org/base", rows=list(rows))

    return make


@pytest.fixture
def served(page):
    """Factory (format, what else) -> a row that was measured."""

    def make(name: str, **about):
        whole = page.Agreement(prompts=12, equal=12, tokens=190, tokens_before_first_difference=190)
        part = whole.model_copy(update={"equal": 10, "tokens_before_first_difference": 170})
        given = {"base": whole, "adapters": {"a": part, "b": whole}, "adapters_apart": True, "date": "2026-11-25"}
        return page.Row(format=name, loads=True, **(given | about))

    return make


def test_the_page_is_that_of_the_files(study):
    machines = study.read_all()
    assert len(machines) >= 2
    assert study.PAGE.read_text() == study.render(machines), "bench/studies/support_matrix.py --render"


def test_a_row_has_its_cells(page, machine, served):
    text = page.render([machine("none", served("nf4", memory_bytes=3 << 30, weights_gib=0.123, tokens_per_s=41.26))])
    assert "## CPU, 2 cores" in text
    line = next(line for line in text.splitlines() if line.startswith("| nf4"))
    said, rest = line.split(" tokens | ")
    assert said == "| nf4 | yes | yes | 12 of 12 / 22 of 24; 550 of 570"
    assert rest == "- | 0.12 GiB | 3.0 GiB | 41.3 | 2026-11-25 |"


def test_a_refusal_is_there_with_its_reason(page, machine):
    text = page.render([machine("none", page.Row(format="fp8", loads=False, refused="it needs a GPU"))])
    assert "| fp8 | refused | - | - |" in text
    assert "- fp8: it needs a GPU" in text


def test_an_adapter_that_says_what_the_base_says_does_not_work(page, machine, served):
    text = page.render([machine("none", served("bf16", adapters_apart=False))])
    assert "| bf16 | yes | no |" in text


def test_what_no_gpu_has_measured_is_not_run_yet(page, machine, served):
    earlier = page.Row(format="nf4", loads=True, how="earlier", source="a trial by hand")
    text = page.render([machine("none", served("nf4")), machine("1 x GPU", served("bf16"), earlier)])
    assert "| nf4 (earlier) | yes | - | - |" in text
    assert "--formats nf4,fp8,w4a16 --render" in text
    everything = [served(name) for name in page.EXPECTED_ON_A_GPU]
    assert "Not run yet" not in page.render([machine("1 x GPU", *everything)])


def test_a_row_takes_the_place_of_its_own_format(machine, served):
    before = machine("none", served("nf4", date="old"), served("bf16"))
    after = before.with_row(served("nf4", date="new"))
    assert {row.format: row.date for row in after.rows} == {"bf16": "2026-11-25", "nf4": "new"}


def test_every_format_that_is_asked_for_can_be_run(page, study):
    assert set(page.EXPECTED_ON_A_GPU) <= set(study.FORMATS)


@pytest.mark.parametrize(
    ("output", "complaint"),
    [
        ("starting\nerror: it needs\na GPU\n\nhint: none\n", "it needs a GPU"),
        ("error: short", "short"),
        ("it just ended", "it just ended"),
    ],
)
def test_the_reason_is_the_error_that_was_printed(study, output: str, complaint: str):
    assert study._complaint(output) == complaint


def test_a_w4a16_checkpoint_is_read_back_as_nearly_the_same_weights(tiny_model: Path, tmp_path: Path):
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from safetensors.torch import load_file

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(STUDIES)
        out = importlib.import_module("w4a16").write(tiny_model, tmp_path / "w4a16")
    packed, plain = load_file(out / "model.safetensors"), load_file(tiny_model / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    weight = plain[f"{name}.weight"]
    codes = unpack_from_int32(packed[f"{name}.weight_packed"], 4, weight.shape)
    scales = packed[f"{name}.weight_scale"].float().repeat_interleave(64, dim=1)
    error = (codes * scales - weight).abs()
    assert (error <= 0.51 * scales + 0.01 * weight.abs()).all()
    assert torch.equal(packed["lm_head.weight"], plain["lm_head.weight"])
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "pack-quantized")
