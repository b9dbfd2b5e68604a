"""The scoring verb on real SGLang says what transformers and PEFT compute, in float32."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

ROWS = [[5, 17, 300, 41, 8, 8, 120], [77, 3], list(range(10, 90)), [9]]
STARTS = [0, 1, 40, 0]
TOLERANCE = 2e-3  # nats; two implementations of one float32 model


@pytest.fixture(scope="module")
def url(start_module_server, tiny_model: Path, marker_adapters: Path) -> str:
    server = start_module_server(str(tiny_model), "--adapters", str(marker_adapters), "--dtype", "float32")
    return server.wait_ready()


def _expected(model: Path, adapter: Path | None) -> list[list[float]]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter:
        reference = PeftModel.from_pretrained(reference, adapter)
    found = []
    for ids, start in zip(ROWS, STARTS, strict=True):
        with torch.no_grad():
            scores = reference(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        following = scores[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
        found.append([0.0, *following][start:])
    return found


@pytest.mark.parametrize("adapter", [None, "alpha", "beta"])
def test_the_engine_says_what_transformers_says(url: str, tiny_model: Path, marker_adapters: Path, adapter) -> None:
    with httpx.Client(base_url=url, trust_env=False, timeout=120) as client:
        model = adapter or client.get("/v1/models").json()["data"][0]["id"]
        answer = client.post("/v1/logprobs", json={"model": model, "input_ids": ROWS, "start": STARTS})
    assert answer.status_code == 200, answer.text
    found = [row["token_logprobs"] for row in answer.json()["data"]]
    wanted = _expected(tiny_model, marker_adapters / adapter if adapter else None)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine == pytest.approx(theirs, abs=TOLERANCE)
