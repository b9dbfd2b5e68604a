"""`verify` over an NF4 base on a CUDA device: what was trained on it passes, and each planted fault is named.

Not run where there is none, and said so. The model is the bundled one, and the command line trains the adapters.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tuneship.core.artifact import Artifact, open_artifact
from tuneship.core.endpoint import read_endpoint
from tuneship.core.hardware import detect
from tuneship.core.model_source import BUNDLED_ID
from tuneship.core.parity import ReferenceRow
from tuneship.core.process import stop_tree
from tuneship.serve.verify import Fault, Verdict, read_evidence, verify
from tuneship.serve.verify.door import DoorScorer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not detect().gpus, reason="NOT RUN: this machine has no CUDA device"),
]

REPOSITORY = Path(__file__).parents[2]
BRIEF = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}:\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant:\n{% endif %}"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """{name: adapter} of two recipes, both on NF4."""
    found = {}
    for recipe in ("quickstart", "triage"):
        run = tmp_path_factory.mktemp("runs") / recipe
        argv = [sys.executable, "-m", "tuneship", "train", str(REPOSITORY / "recipes" / f"{recipe}.toml")]
        subprocess.run([*argv, "--run", str(run)], check=True, timeout=600)
        found[recipe] = open_artifact(next(run.glob("artifacts/adapter-*")), kind="adapter")
    return found


@pytest.fixture(scope="module")
def url(trained: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the NF4 base with the right adapter, another one, and the right one at other strengths."""
    folder = tmp_path_factory.mktemp("serve")
    adapters = folder / "adapters"
    adapters.mkdir()
    right = trained["quickstart"].path
    for name, source, strength in (
        ("right", right, 1.0),
        ("half", right, 0.5),
        ("double", right, 2.0),
        ("other", trained["triage"].path, 1.0),
    ):
        (adapters / name).mkdir()
        shutil.copy(source / "adapter_model.safetensors", adapters / name)
        config = json.loads((source / "adapter_config.json").read_text())
        (adapters / name / "adapter_config.json").write_text(
            json.dumps(config | {"lora_alpha": strength * config["lora_alpha"]})
        )
    argv = [sys.executable, "-m", "tuneship", "serve", BUNDLED_ID, "--adapters", str(adapters), "--port", "0"]
    argv += ["--quantization", "nf4", "--endpoint-file", str(folder / "endpoint.json")]
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(argv, stdout=output, stderr=output, cwd=folder)
    try:
        while not (folder / "endpoint.json").exists():
            assert process.poll() is None, (folder / "output").read_text()
            time.sleep(0.5)
        yield read_endpoint(folder / "endpoint.json").url
    finally:
        stop_tree(process, 20)


async def judged(url: str, model: str | None, reference: list[ReferenceRow]) -> Verdict:
    async with DoorScorer(url) as scorer:
        await scorer.served()
        return await verify(scorer, model, reference, same_bits=True)


@pytest.mark.parametrize(
    ("answers", "fault"),
    [
        ("right", Fault.NONE),
        (None, Fault.BASE),
        ("half", Fault.SCALE),
        ("double", Fault.SCALE),
        ("other", Fault.OTHER_ADAPTER),
    ],
)
async def test_what_answers_is_named(url: str, trained: dict[str, Artifact], answers: str | None, fault: Fault) -> None:
    verdict = await judged(url, answers, list(read_evidence(trained["quickstart"].evidence)))
    sys.stdout.write(f"{answers}: {verdict}\n")
    assert (verdict.fault, verdict.passed) == (fault, fault is Fault.NONE), verdict.message


@pytest.mark.parametrize(
    ("changed", "fault"), [({"template": BRIEF}, Fault.TEMPLATE), ({"noise": 0.1}, Fault.OTHER_BASE)]
)
async def test_what_was_trained_otherwise_is_named(
    url: str, trained: dict[str, Artifact], changed: dict[str, Any], fault: Fault
) -> None:
    """The same adapter, with the evidence of a training under another template, or on a base with other weights."""
    reference = _measured(trained["quickstart"], **changed)
    verdict = await judged(url, "right", reference)
    sys.stdout.write(f"{changed}: {verdict}\n")
    assert verdict.fault is fault, verdict.message


def _measured(adapter: Artifact, template: str = "", noise: float = 0.0) -> list[ReferenceRow]:
    """What training would have stored, with one thing changed; `noise` is a share of each base weight's deviation."""
    import torch
    from peft import PeftModel
    from transformers import AutoTokenizer

    from tuneship.core.model_source import resolve
    from tuneship.core.recipe import Model, Quantization
    from tuneship.train.data.template import ChatTemplate, Conversation
    from tuneship.train.model import load_base
    from tuneship.train.parity import measure_reference

    rows = read_evidence(adapter.evidence)
    path = resolve(BUNDLED_ID).path
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = template or tokenizer.chat_template
    encode: Callable[..., Any] = ChatTemplate(tokenizer).encode
    base = load_base(path, Model(id=BUNDLED_ID), None if noise else Quantization())
    torch.manual_seed(0)
    for parameter in base.parameters() if noise else ():
        parameter.data += noise * parameter.data.std() * torch.randn_like(parameter.data)
    model = PeftModel.from_pretrained(base, adapter.path).eval()
    return list(measure_reference(model, [encode(Conversation(row.messages or [])) for row in rows], 0, "bfloat16"))
