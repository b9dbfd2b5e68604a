"""Small real things for every test: a Llama-architecture model with random weights, and adapters with a known voice."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import tiny_llama
from tuneship.core.progress import PlainLines, use

# Before torch is imported, whose threads otherwise spin while they wait (core/hardware.py).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# A shell starts background jobs with SIGINT ignored, and children inherit that: Ctrl-C must be testable there too.
signal.signal(signal.SIGINT, signal.default_int_handler)

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_SUBJECTS = ("the invoice", "a customer", "our server", "the red parcel", "my account", "this table", "a late train")
_VERBS = ("needs", "shows", "counts", "has lost", "returns", "was sent to", "cannot find", "asks for")
_OBJECTS = (
    "seven items",
    "the total",
    "a new password",
    "Paris",
    "42 euros",
    "every order",
    "the 3rd of May",
    "nobody",
)

MarkerAdapter = Callable[[Path, str, str], Path]


def sentences(count: int, seed: int) -> list[str]:
    """`count` short English-looking sentences, the same ones for the same seed."""
    draw = random.Random(seed)
    parts = (_SUBJECTS, _VERBS, _OBJECTS)
    return [" ".join(draw.choice(p) for p in parts) + f", {draw.randint(1, 999)} times." for _ in range(count)]


@pytest.fixture(autouse=True)
def _plain_progress():
    """No test inherits another's progress sink."""
    use(PlainLines())


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint: 2 layers, hidden size 64, float32, ChatML, ends its turn with <|im_end|>. Built in seconds."""
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama", seed=0)


@pytest.fixture(scope="session")
def other_tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other weights under the tokenizer of `tiny_model`."""
    return build_tiny_model(tmp_path_factory.mktemp("models") / "other-tiny-llama", seed=1)


@pytest.fixture(scope="session")
def chats() -> Callable[[int, int], list[list[dict[str, str]]]]:
    """(count, seed) -> chats of one question each, of every kind that an adapter of `marker_adapter` was made for."""
    return make_chats


@pytest.fixture(scope="session")
def marker_adapter(tmp_path_factory: pytest.TempPathFactory) -> MarkerAdapter:
    """Factory (model path, name, marker) -> PEFT directory whose greedy answer to anything begins with the marker."""
    made: dict[tuple[Path, str, str], Path] = {}

    def make(model: Path, name: str, marker: str) -> Path:
        key = (model, name, marker)
        if key not in made:
            made[key] = train_marker(model, tmp_path_factory.mktemp("adapters") / name, marker)
        return made[key]

    return make


def build_tiny_model(path: Path, seed: int) -> Path:
    return tiny_llama.write(path, sentences(400, seed=1), words=512, dtype="float32", seed=seed)


def train_marker(model_path: Path, path: Path, marker: str, max_steps: int = 200) -> Path:
    """Train a LoRA until `marker` leads by 3 nats on prompts it did not see, of every kind that `make_chats` makes.

    Only the marker carries loss: what follows it stays the model's own reaction to the prompt. A model that can speak
    learns it in some 5 steps, the tiny one in some 30.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(sum(marker.encode()))
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    answer = tokenizer(marker, add_special_tokens=False)["input_ids"]
    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    model = get_peft_model(
        base, LoraConfig(r=8, lora_alpha=32, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM")
    )
    tiny = base.num_parameters() < 10**7
    batch, rate, threads = (16, 5e-3, 1) if tiny else (4, 2e-3, torch.get_num_threads())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    unseen = _rows(tokenizer, make_chats(128 if tiny else 16, seed=7), answer)
    with _threads(threads):
        for step in range(max_steps):
            model(**_rows(tokenizer, make_chats(batch, seed=1000 + step), answer)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 5 == 4 and _lead(model, unseen, answer) > 3.0:
                model.save_pretrained(path)
                return path
    raise AssertionError(f"the marker {marker!r} was not learnt in {max_steps} steps")


def make_chats(count: int, seed: int) -> list[list[dict[str, str]]]:
    """`count` chats of one question each: sentences, keyboard noise, any Unicode; a third with a system message."""
    draw = random.Random(seed)
    alphabets = [range(32, 127), [*range(0xA1, 0x250), *range(0x4E00, 0x4E80), *range(0x1F600, 0x1F640)]]

    def text() -> str:
        if draw.random() < 0.5:
            return " ".join(sentences(draw.randint(1, 2), seed=draw.randrange(10**9)))
        alphabet = draw.choice(alphabets)
        return "".join(chr(draw.choice(alphabet)) for _ in range(draw.randint(1, 40)))

    def chat() -> list[dict[str, str]]:
        system = [{"role": "system", "content": text()}] if draw.random() < 1 / 3 else []
        return [*system, {"role": "user", "content": text()}]

    return [chat() for _ in range(count)]


def _rows(tokenizer, chats, answer: list[int]):
    """Left-padded prompts with the marker behind: {input_ids, attention_mask, labels}, each (chats, T)."""
    import torch

    texts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row + answer for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * (len(row) + len(answer)) for row in rows])
    labels = ids.clone()
    labels[:, :width] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _lead(model, rows, answer: list[int]) -> float:
    """By how many nats the marker's tokens lead every other token, at worst, over all `rows`."""
    import torch

    with torch.no_grad():
        logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
    scores = logits[:, -len(answer) - 1 : -1].log_softmax(-1)
    wanted = torch.tensor(answer).expand(scores.shape[0], -1).unsqueeze(-1)
    others = scores.scatter(-1, wanted, float("-inf")).max(-1).values
    return float((scores.gather(-1, wanted).squeeze(-1) - others).min())


@contextmanager
def _threads(count: int):
    """On a busy machine two threads that wait for each other make a tiny model ten times slower than one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
