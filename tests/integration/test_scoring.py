"""The scoring verb on real SGLang, and `bench nll` through it, say what transformers and PEFT compute, in float32."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from tuneship.bench.quality.nll import measure_nll
from tuneship.bench.target import resolve

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

ROWS = [[5, 17, 300, 41, 8, 8, 120], [77, 3], list(range(10, 90)), [9]]
STARTS = [0, 1, 40, 0]
TOLERANCE = 2e-3  # nats; two implementations of one float32 model


@pytest.fixture
def url(adapter_server) -> str:
    return adapter_server.endpoint.url


def _expected(
    model: Path, adapter: Path | None, rows: list[list[int]] = ROWS, starts: list[int] = STARTS
) -> list[list[float]]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter:
        reference = PeftModel.from_pretrained(reference, adapter)
    found = []
    for ids, start in zip(rows, starts, strict=True):
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


CHATS = [
    [("user", "What needs seven items?"), ("assistant", "the invoice needs seven items")],
    [("system", "Be brief."), ("user", "Who asks?"), ("assistant", "a customer, 3 times.")],
    [("user", "Hi"), ("assistant", "Hello"), ("user", "And Paris?"), ("assistant", "a late train\nreturns \u2603")],
]


def _rendered(model: Path) -> tuple[list[list[int]], list[int]]:
    """As training learns the last answer of each chat: its tokens through its end of turn, and where it begins."""
    from transformers import AutoTokenizer

    from tuneship.train.data.template import ChatTemplate, Conversation

    template = ChatTemplate(AutoTokenizer.from_pretrained(model))
    rows, starts = [], []
    for chat in CHATS:
        encoded = template.encode(Conversation([{"role": r, "content": text} for r, text in chat]), "completion")
        learnt = [index for index, kept in enumerate(encoded.loss_mask) if kept]
        rows.append(encoded.input_ids[: learnt[-1] + 1])
        starts.append(learnt[0])
    return rows, starts


def test_a_tokenizer_that_names_no_longest_input_is_asked_all_the_same(url: str, tiny_model: Path) -> None:
    """SGLang alone answers 500: its JSON cannot hold the 10^30 that stands for it."""
    prompt = [{"role": role, "content": text} for role, text in CHATS[0][:-1]]
    with httpx.Client(base_url=url, trust_env=False, timeout=120) as client:
        answer = client.post("/v1/tokenize", json={"model": "alpha", "messages": prompt})
    rows, starts = _rendered(tiny_model)
    assert answer.json()["tokens"] == rows[0][: starts[0]]


@pytest.mark.parametrize("adapter", [None, "alpha"])
def test_the_likelihood_of_chats(url: str, tiny_model: Path, marker_adapters: Path, adapter, tmp_path: Path) -> None:
    lines = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in CHATS]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = measure_nll(resolve(url, adapter or tiny_model.name), str(tmp_path / "chats.jsonl"), tmp_path)
    by_row = [json.loads(line) for line in (tmp_path / found.items_file).read_text().splitlines()]
    wanted = _expected(tiny_model, marker_adapters / adapter if adapter else None, *_rendered(tiny_model))
    assert [row["tokens"] for row in by_row] == [len(row) for row in wanted]
    assert [row["nll"] for row in by_row] == pytest.approx([-sum(r) / len(r) for r in wanted], abs=TOLERANCE)
    flat = [figure for row in wanted for figure in row]
    assert found.nll == pytest.approx(-sum(flat) / len(flat), abs=TOLERANCE)
