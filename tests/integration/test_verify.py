"""`verify` on real SGLang: a really trained adapter passes on its own evidence, and every planted fault is named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tuneship.core.artifact import Artifact, draft, open_artifact, seal
from tuneship.core.cache import cache_dir
from tuneship.core.parity import ReferenceRow, Verification
from tuneship.serve import quantized
from tuneship.serve.verify import Fault, Outcome, Verdict, read_evidence, verify, verify_merged
from tuneship.serve.verify.door import DoorScorer

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

NAME = "totals"
RECIPE = """
name = "totals"
[model]
id = "{model}"
dtype = "float32"
[quantization]
method = "{quantization}"
[data]
train = "train.jsonl"
heldout = "heldout.jsonl"
[lora]
rank = 8
[train]
method = "{method}"
effective_batch = 8
steps = 12
learning_rate = 5e-3
optimizer = "adamw"
[merge]
max_nll_increase = 2.0
"""
OTHER_CHATML = (
    "<|im_start|>system\nBe brief.<|im_end|>\n{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train(model: Path, folder: Path, *, quantization: str = "none", until: str = "merge") -> Path:
    """A run that trained and merged, by the command line."""
    method = "qlora" if quantization == "nf4" else "lora"
    (folder / "recipe.toml").write_text(RECIPE.format(model=model, quantization=quantization, method=method))
    for name, numbers in (("train", range(48)), ("heldout", range(100, 116))):
        chats = [[("user", f"count {i}"), ("assistant", f"the total is {i}")] for i in numbers]
        rows = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = tuneship("up", "recipe.toml", "--until", until, "--run", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def tuneship(*args: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "tuneship", *map(str, args)]
    return subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=200, check=False)


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_model, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def trained(run: Path) -> Artifact:
    return open_artifact(next(run.glob("artifacts/adapter-*")), kind="adapter")


@pytest.fixture(scope="module")
def merged(run: Path) -> Artifact:
    return open_artifact(next(run.glob("artifacts/merged-*")), kind="merged")


@pytest.fixture(scope="module")
def stranger(other_tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on another base."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    path = tmp_path_factory.mktemp("stranger")
    base = AutoModelForCausalLM.from_pretrained(other_tiny_model, dtype=torch.float32)
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapters(trained: Artifact, stranger: Path, tiny_model: Path, marker_adapter, tmp_path_factory) -> Path:
    """The trained adapter, and everything that might answer in its place."""
    folder = tmp_path_factory.mktemp("adapters")
    (folder / NAME).symlink_to(trained.path)
    for name, source, strength in (
        ("half", trained.path, 0.5),
        ("double", trained.path, 2.0),
        ("alpha", marker_adapter(tiny_model, "alpha", "<alpha>"), 1.0),
        ("stranger", stranger, 1.0),
    ):
        (folder / name).mkdir()
        config = json.loads((source / "adapter_config.json").read_text())
        config["lora_alpha"] *= strength
        (folder / name / "adapter_config.json").write_text(json.dumps(config))
        shutil.copy(source / "adapter_model.safetensors", folder / name)
    return folder


@pytest.fixture(scope="module")
def url(start_module_server, tiny_model: Path, adapters: Path) -> str:
    return start_module_server(str(tiny_model), "--adapters", str(adapters), "--dtype", "float32").wait_ready()


def measured(model: Path, adapter: Path, rows: Sequence[ReferenceRow], template: str = "") -> list[ReferenceRow]:
    """The evidence of `adapter` on `model`, as training writes it, about the conversations of `rows`."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tuneship.train.data.template import ChatTemplate, Conversation
    from tuneship.train.parity import measure_reference

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = template or tokenizer.chat_template
    encoded = [ChatTemplate(tokenizer).encode(Conversation(row.messages or [])) for row in rows]
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return measure_reference(PeftModel.from_pretrained(base, adapter).eval(), encoded, 0, "float32")


async def judged(url: str, model: str | None, reference: Sequence[ReferenceRow], **options) -> Verdict:
    async with DoorScorer(url) as scorer:
        await scorer.served()
        return await verify(scorer, model, reference, **options)


async def test_what_was_trained_passes_with_its_prompts(url: str, trained: Artifact) -> None:
    verdict = await judged(url, NAME, read_evidence(trained.evidence))
    assert verdict.passed, verdict.message
    assert verdict.deviation.mean < 1e-3
    assert verdict.power > 50
    assert verdict.scale == pytest.approx(1, abs=0.01)
    assert (verdict.rows, verdict.prompts) == (16, 16), "training kept no conversations, or not all were compared"


@pytest.mark.parametrize(
    ("answers", "fault"),
    [(None, Fault.BASE), ("half", Fault.SCALE), ("double", Fault.SCALE), ("alpha", Fault.OTHER_ADAPTER)],
)
async def test_what_answers_instead_is_named(url: str, trained: Artifact, answers: str | None, fault: Fault) -> None:
    verdict = await judged(url, answers, read_evidence(trained.evidence))
    assert (verdict.outcome, verdict.fault) == (Outcome.FAILED, fault), verdict.message


async def test_another_adapter_of_the_server_is_called_by_name(url: str, trained: Artifact) -> None:
    others = {"beta@1": "stranger", "alpha@1": "alpha"}
    verdict = await judged(url, "alpha", read_evidence(trained.evidence), others=others)
    assert verdict.fault is Fault.OTHER_ADAPTER
    assert "'alpha@1' answers in its place" in verdict.message


async def test_another_base(url: str, trained: Artifact, other_tiny_model: Path, stranger: Path) -> None:
    """The stranger's own evidence: it is served, but not on what it was trained on."""
    reference = measured(other_tiny_model, stranger, read_evidence(trained.evidence))
    verdict = await judged(url, "stranger", reference)
    assert verdict.fault is Fault.OTHER_BASE, verdict.message


async def test_another_template(url: str, trained: Artifact, tiny_model: Path) -> None:
    reference = measured(tiny_model, trained.path, read_evidence(trained.evidence), OTHER_CHATML)
    verdict = await judged(url, NAME, reference)
    assert verdict.fault is Fault.TEMPLATE, verdict.message
    assert verdict.deviation.within(verdict.limit), "the likelihoods cannot see it: they are of given tokens"


async def test_an_adapter_without_evidence_is_seen_to_be_applied(url: str) -> None:
    applied, ignored = await judged(url, "alpha", []), await judged(url, None, [])
    assert (applied.outcome, applied.fault) == (Outcome.NO_EVIDENCE, Fault.NONE), applied.message
    assert (ignored.outcome, ignored.fault) == (Outcome.FAILED, Fault.BASE), ignored.message


def test_the_verb(url: str, trained: Artifact, adapters: Path, tmp_path: Path) -> None:
    proven = tuneship("verify", trained.path, "--url", url, "--record", cwd=tmp_path)
    assert proven.returncode == 0, proven.stderr
    lines = dict(line.split(maxsplit=1) for line in proven.stdout.splitlines())
    assert (lines["model"], lines["version"], lines["verdict"]) == (trained.version, trained.version, "passed")
    record = Verification.model_validate_json((trained.evidence / "verify-1.json").read_text())
    assert (record.outcome, record.fault, record.version) == ("passed", "", trained.version)
    failed = tuneship("verify", trained.path, "--url", url, "--model", "half", cwd=tmp_path)
    assert failed.returncode == 1
    assert "another strength" in failed.stderr
    assert "Traceback" not in failed.stderr
    unknown = tuneship("verify", adapters / "alpha", "--url", url, cwd=tmp_path)
    assert unknown.returncode == 3, unknown.stderr
    assert "no evidence" in unknown.stderr
    assert "limit" not in unknown.stdout
    run = trained.path.parents[1]
    of_run = tuneship("verify", run, "--url", url, cwd=tmp_path)
    assert of_run.returncode == 0, of_run.stderr
    assert trained.version in of_run.stdout
    changed = shutil.copytree(trained.path, tmp_path / "changed")
    weights = bytearray((changed / "adapter_model.safetensors").read_bytes())
    weights[-1] ^= 1
    (changed / "adapter_model.safetensors").write_bytes(weights)
    other = tuneship("verify", changed, "--url", url, cwd=tmp_path)
    assert other.returncode == 1
    assert "was changed after it was written" in other.stderr
    absent = tuneship("verify", trained.path, "--url", url, "--model", "nobody", cwd=tmp_path)
    assert absent.returncode == 1
    assert "serves no model 'nobody'" in absent.stderr
    assert NAME in absent.stderr
    assert open_artifact(trained.path).manifest == trained.manifest, "evidence is no part of the payload"


@pytest.mark.parametrize(
    ("answers", "fault"),
    [(NAME, Fault.NONE), (None, Fault.BASE), ("half", Fault.SCALE), ("alpha", Fault.OTHER_ADAPTER)],
)
async def test_a_merged_model_and_what_may_answer_instead(url: str, merged: Artifact, answers, fault: Fault) -> None:
    """In float32 the adapter on its base is the merged model."""
    reference = read_evidence(merged.evidence)
    async with DoorScorer(url) as scorer:
        await scorer.served()
        verdict = await verify_merged(scorer, reference, selector=answers, float32=True)
    assert (verdict.fault, verdict.passed) == (fault, fault is Fault.NONE), verdict.message


async def judged_merged(url: str, reference: Sequence[ReferenceRow]) -> Verdict:
    """The trained adapter on its base as a merged model, against what `reference` says that merging measured."""
    rows = [row.model_copy(update={"merged": row.trained}) for row in reference]
    async with DoorScorer(url) as scorer:
        await scorer.served()
        return await verify_merged(scorer, rows, selector=NAME, float32=True)


async def test_a_merged_model_of_another_base(url: str, trained: Artifact, other_tiny_model: Path) -> None:
    """The same training, merged into another base. A merged model's server has no base to ask: it is another model."""
    reference = measured(other_tiny_model, trained.path, read_evidence(trained.evidence))
    verdict = await judged_merged(url, reference)
    assert (verdict.outcome, verdict.fault) == (Outcome.FAILED, Fault.OTHER_ADAPTER), verdict.message
    assert "another model answers in its place" in verdict.message


async def test_a_merged_model_under_another_template(url: str, trained: Artifact, tiny_model: Path) -> None:
    reference = measured(tiny_model, trained.path, read_evidence(trained.evidence), OTHER_CHATML)
    verdict = await judged_merged(url, reference)
    assert (verdict.outcome, verdict.fault) == (Outcome.FAILED, Fault.TEMPLATE), verdict.message
    assert verdict.deviation.within(verdict.limit), "the likelihoods cannot see it: they are of given tokens"


def test_a_server_asks_itself_and_refuses_to_load_what_was_not_trained(
    url: str, trained: Artifact, tmp_path: Path
) -> None:
    """Sealed, whole, with the true evidence, and another alpha than any adapter of this server has."""
    with draft(tmp_path) as work:
        shutil.copytree(trained.path, work, dirs_exist_ok=True)
        config = json.loads((work / "adapter_config.json").read_text())
        (work / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 0.4 * config["lora_alpha"]}))
        planted = seal(work, trained.manifest)
    refused = tuneship("adapters", "load", planted.path, "--alias", "weak", "--url", url, cwd=tmp_path)
    assert refused.returncode == 1, refused.stdout
    assert "at another strength" in refused.stderr
    listed = tuneship("adapters", "list", "--url", url, cwd=tmp_path).stdout.splitlines()
    assert not [line for line in listed if "weak" in line]
    (mine,), (foreign,) = ([line for line in listed if name in line] for name in (NAME, "alpha"))
    assert "passed" in mine
    assert "no evidence" in foreign


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merged_checkpoint(start_server, merged: Artifact, dtype: str, tmp_path: Path) -> None:
    url = start_server(str(merged.path), "--dtype", dtype).wait_ready()
    proven = tuneship("verify", merged.path, "--url", url, cwd=tmp_path)
    assert proven.returncode == 0, proven.stderr
    assert "16 rendered as in training" in proven.stdout


@pytest.mark.slow
async def test_in_bfloat16(start_server, tiny_model: Path, adapters: Path, trained: Artifact) -> None:
    url = start_server(str(tiny_model), "--adapters", str(adapters), "--dtype", "bfloat16").wait_ready()
    reference = read_evidence(trained.evidence)
    healthy = await judged(url, NAME, reference)
    assert healthy.passed, healthy.message
    assert healthy.noise_floor.mean > 1e-3, "that was not bfloat16"
    for answers, fault in ((None, Fault.BASE), ("half", Fault.SCALE), ("alpha", Fault.OTHER_ADAPTER)):
        verdict = await judged(url, answers, reference)
        assert verdict.fault is fault, verdict.message


@pytest.mark.slow
async def test_trained_on_other_bits(start_server, adapters: Path, tiny_model: Path, tmp_path: Path) -> None:
    """A QLoRA adapter on the 16-bit base: it passes, the base and another adapter do not, and the floor is told."""
    (adapter,) = train(tiny_model, tmp_path, quantization="nf4").glob("artifacts/adapter-*")
    (tmp_path / "adapters").mkdir()
    for name, path in ((NAME, adapter), ("alpha", adapters / "alpha")):
        (tmp_path / "adapters" / name).symlink_to(path)
    url = start_server(str(tiny_model), "--adapters", str(tmp_path / "adapters"), "--dtype", "float32").wait_ready()
    reference = read_evidence(adapter / "evidence")
    healthy = await judged(url, NAME, reference)
    assert healthy.passed, healthy.message
    assert healthy.noise_floor.mean > 0.1
    assert (await judged(url, None, reference)).fault is Fault.BASE
    assert (await judged(url, "alpha", reference)).fault is Fault.OTHER_ADAPTER


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, so that the base is built here; only SGLang's bytecode is in it."""
    bytecode = cache_dir() / "bytecode"
    bytecode.mkdir(exist_ok=True)
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "bytecode").symlink_to(bytecode)
    monkeypatch.setenv("TUNESHIP_CACHE", str(folder))
    return folder


@pytest.fixture
def in_16_bits(tiny_model: Path, tmp_path: Path) -> Path:
    """`tiny_model` as models are published: of a float32 checkpoint training and the base pack different values."""
    import torch
    from transformers import AutoModelForCausalLM

    path = tmp_path / "in-16-bits"
    shutil.copytree(tiny_model, path)
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(path)
    return path


async def test_on_the_values_of_training_in_16_bits(
    start_server, own_cache: Path, in_16_bits: Path, other_tiny_model: Path, tmp_path: Path
) -> None:
    """A QLoRA adapter over the dequantized base passes under the strict limit, which names any other values."""
    (adapter,) = train(in_16_bits, tmp_path, quantization="nf4", until="train").glob("artifacts/adapter-*")
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / NAME).symlink_to(adapter)
    flags = ("--quantization", "dequantized", "--adapters", str(tmp_path / "adapters"), "--dtype", "float32")
    url = start_server(str(in_16_bits), *flags).wait_ready()
    (base,) = (own_cache / "bases").glob("base-dequantized-*")
    assert quantized.same_bits(adapter, base, "float32")
    reference = read_evidence(adapter / "evidence")
    healthy = await judged(url, NAME, reference, same_bits=True)
    assert healthy.passed, healthy.message
    assert healthy.base_noise
    assert healthy.base_noise.mean < 0.05
    instead = await judged(url, None, reference, same_bits=True)
    assert instead.fault is Fault.BASE, instead.message
    for trained_on in (in_16_bits, other_tiny_model):  # the original has other values, too
        verdict = await judged(url, NAME, measured(trained_on, adapter, reference), same_bits=True)
        assert verdict.fault is Fault.OTHER_BASE, verdict.message
