"""Servers as a user starts them: `python -m tuneship serve ...`, watched from outside."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import aiohttp
import psutil
import pytest

from tuneship.core.endpoint import Endpoint, read_endpoint
from tuneship.core.process import descendants, stop_tree

START_TIMEOUT_S = 180
IN_FLIGHT = 16
MARKERS = {"alpha": "<alpha>", "beta": "<beta>", "gamma": "<gam>"}
LONGEST_FILE = "test_docs_walk.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest: a worker that begins it last keeps the other one waiting for minutes."""
    items.sort(key=lambda item: item.path.name != LONGEST_FILE)


@dataclass
class Server:
    """A `tuneship serve` in its own directory."""

    folder: Path
    process: subprocess.Popen[bytes]
    _family: set[psutil.Process] = field(default_factory=set)

    @property
    def endpoint_file(self) -> Path:
        return self.folder / "endpoint.json"

    @property
    def said(self) -> str:
        """Everything that it printed."""
        return (self.folder / "output").read_text()

    @property
    def endpoint(self) -> Endpoint:
        return read_endpoint(self.endpoint_file)

    def wait_ready(self) -> str:
        """The URL, once the door is open."""
        self.wait_for(self.endpoint_file.exists)
        self.family()
        return self.endpoint.url

    def wait_for(self, condition: Callable[[], object], timeout_s: float = START_TIMEOUT_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, f"it ended: {self.said}"
            assert time.monotonic() < deadline, f"still waiting: {self.said}"
            time.sleep(0.1)

    def family(self) -> set[psutil.Process]:
        """Every process of the engine that was ever seen."""
        self._family |= set(descendants(self.process.pid))
        return self._family

    def engine(self, name: str) -> psutil.Process:
        """The engine's process whose command line contains `name`."""
        (found,) = [process for process in self.family() if name in " ".join(process.cmdline())]
        return found

    def signal(self, number: signal.Signals) -> None:
        self.family()
        self.process.send_signal(number)

    def exit_code(self, timeout_s: float = 40) -> int:
        return self.process.wait(timeout_s)

    def assert_no_orphans(self, within_s: float = 5) -> None:
        """None of the engine's processes is left, and the endpoint is not announced any more."""
        assert self._family, "nobody was seen"
        _, alive = psutil.wait_procs(list(self._family), timeout=within_s)
        assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


StartServer = Callable[..., Server]


@pytest.fixture
def start_server(tmp_path: Path):
    """Factory (arguments..., threads=1) -> a `Server` that is starting; all are ended with the test."""
    with _servers(tmp_path) as start:
        yield start


@pytest.fixture(scope="module")
def start_module_server(tmp_path_factory: pytest.TempPathFactory):
    """`start_server`, for a server that a module's tests share."""
    with _servers(tmp_path_factory.mktemp("server")) as start:
        yield start


@contextlib.contextmanager
def _servers(folder: Path) -> Iterator[StartServer]:
    started: list[Server] = []

    def start(*arguments: str, threads: int = 1) -> Server:
        here = folder / f"server-{len(started)}"
        here.mkdir()
        files = ["--endpoint-file", str(here / "endpoint.json"), "--log", str(here / "engine.log")]
        argv = [sys.executable, "-m", "tuneship", "serve", *arguments, "--port", "0", *files]
        # On a busy machine two threads that wait for each other make a tiny model ten times slower than one.
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "TUNESHIP_KEYS": str(here / "keys.toml")}
        with (here / "output").open("wb") as output:
            process = subprocess.Popen(argv, stdout=output, stderr=output, cwd=here, env=env)
        started.append(Server(here, process))
        return started[-1]

    try:
        yield start
    finally:
        for server in started:
            stop_tree(server.process, grace_s=20)


@pytest.fixture(scope="session")
def _adapter_servers(tiny_model: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory):
    """-> a server that is ready: the one before, or another where that was ended."""
    running: list[Server] = []
    with _servers(tmp_path_factory.mktemp("adapter-server")) as start:

        def get() -> Server:
            if not running or running[-1].process.poll() is not None:
                running.append(start(str(tiny_model), "--adapters", str(adapters), "--dtype", "float32"))
                running[-1].wait_ready()
            return running[-1]

        yield get


@pytest.fixture
def adapter_server(_adapter_servers: Callable[[], Server]) -> Server:
    """The tiny base with `adapters` in float32: one server for all tests that change nothing of it."""
    return _adapter_servers()


@pytest.fixture(scope="session")
def adapters(marker_adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three marker adapters and, made of alpha's tensors, three as other trainers leave them."""
    folder = tmp_path_factory.mktemp("adapters")
    for path in marker_adapters.iterdir():
        (folder / path.name).symlink_to(path.resolve())
    pattern = r"model\.layers\.\d+\.(?:self_attn|mlp)\.(?:[qkvo]|gate|up|down)_proj"
    rslora = {"use_rslora": True, "lora_alpha": 32 / 8**0.5}  # alpha's own scaling, 32 / 8
    _write_foreign(marker_adapters / "alpha", folder / "stable", {"target_modules": pattern, **rslora})
    _write_foreign(
        marker_adapters / "alpha",
        folder / "thin",
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
        keep=r"layers\.1\.self_attn\.[qv]_proj",
    )
    patterns = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 5, "1.mlp.down_proj": 70}}
    _write_foreign(marker_adapters / "alpha", folder / "uneven", patterns, ranks={"q_proj": 3})
    return folder


def _write_foreign(source: Path, path: Path, config: dict, keep: str = "", ranks: dict[str, int] | None = None) -> None:
    """An adapter with those of `source`'s tensors whose names match `keep`, in half precision, and other settings.

    Of the modules in `ranks` only that much of the rank is kept.
    """
    from safetensors.numpy import load_file, save_file

    path.mkdir()
    settings = json.loads((source / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(settings | config))
    tensors = load_file(source / "adapter_model.safetensors")
    half = {key: value.astype("float16") for key, value in tensors.items() if re.search(keep, key)}
    for key in half:
        rank = next((rank for name, rank in (ranks or {}).items() if name in key), None)
        half[key] = (half[key][:rank] if "lora_A" in key else half[key][:, :rank]).copy()
    save_file(half, path / "adapter_model.safetensors")


@pytest.fixture(scope="session")
def marker_adapters(tiny_model: Path, marker_adapter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of three adapters on the tiny model, each with its own voice."""
    folder = tmp_path_factory.mktemp("marker-adapters")
    for name, marker in MARKERS.items():
        (folder / name).symlink_to(marker_adapter(tiny_model, name, marker))
    return folder


@pytest.fixture(scope="session")
def markers() -> dict[str, str]:
    """{adapter: what all of its answers begin with}."""
    return MARKERS


class Answer(NamedTuple):
    """One greedy answer; `ids` without the end of the turn."""

    model: str
    version: str
    text: str
    prompt_ids: list[int]
    ids: list[int]


AskAll = Callable[[str, list[tuple[str, list]], int], Awaitable[list[Answer]]]


@pytest.fixture(scope="session")
def ask_all() -> AskAll:
    """(url, [(model, chat)...], tokens) -> one greedy answer each, 16 at a time, in the order asked."""

    async def ask(
        session: aiohttp.ClientSession, gate: asyncio.Semaphore, model: str, chat: list, tokens: int
    ) -> Answer:
        body = {"model": model, "messages": chat, "temperature": 0, "max_tokens": tokens, "return_token_ids": True}
        async with gate, session.post("/v1/chat/completions", json=body) as response:
            answer = await response.json()
            assert response.status == 200, answer
            version = response.headers["x-tuneship-version"]
        (choice,) = answer["choices"]
        ended = choice["finish_reason"] == "stop"
        said = choice.get("token_ids") or choice["response_token_ids"]  # SGLang 0.5.17, 0.5.23
        ids = said[:-1] if ended else said
        return Answer(answer["model"], version, choice["message"]["content"], choice["prompt_token_ids"], ids)

    async def ask_each(url: str, asked: list[tuple[str, list]], tokens: int) -> list[Answer]:
        gate = asyncio.Semaphore(IN_FLIGHT)
        async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(total=600)) as session:
            return list(await asyncio.gather(*(ask(session, gate, model, chat, tokens) for model, chat in asked)))

    return ask_each


@pytest.fixture(scope="session")
def equal_share() -> Callable[[Path, Path, list[Answer]], dict[str, float]]:
    """(base, adapters' directory, answers) -> {model: share whose token ids transformers + PEFT gives too}.

    A model without a directory of its name is the base.
    """

    def share(base: Path, adapters: Path, answers: list[Answer]) -> dict[str, float]:
        found = {}
        for name in dict.fromkeys(answer.model for answer in answers):
            mine = [answer for answer in answers if answer.model == name]
            adapter = adapters / name if (adapters / name).exists() else None
            reference = _greedy(base, adapter, [answer.prompt_ids for answer in mine], max(len(a.ids) for a in mine))
            found[name] = sum(a.ids == ids for a, ids in zip(mine, reference, strict=True)) / len(mine)
        return found

    return share


def _greedy(base: Path, adapter: Path | None, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """What transformers + PEFT answers in float32, up to the end of its turn; 20 prompts at once, padded left."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):  # bitsandbytes' 4-bit layers, which choose bfloat16 themselves
            layer.compute_dtype, layer.support_avx512bf16_for_cpu = torch.float32, False
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    answers: list[list[int]] = []
    for start in range(0, len(prompts), 20):
        batch = tokenizer.pad({"input_ids": prompts[start : start + 20]}, return_tensors="pt")
        with torch.no_grad():
            output = model.generate(**batch, max_new_tokens=tokens, do_sample=False)
        for ids in output[:, batch["input_ids"].shape[1] :].tolist():
            end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
            answers.append(ids[:end])
    return answers
