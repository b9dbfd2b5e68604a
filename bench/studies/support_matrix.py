"""Which formats of a base are served here, with LoRA, and how well: the rows of `docs/support-matrix.md` for a machine.

Each row starts a real `tuneship serve` with two adapters, asks the base and both of them greedily, several at once, and
holds the token ids against transformers + PEFT on the same weights. What is refused is on record with its reason.

    .venv/bin/python bench/studies/support_matrix.py --formats float32,bf16,nf4,fp8,w4a16   # this machine's file
    .venv/bin/python bench/studies/support_matrix.py --render                               # the page, of all files

A row that is there already stays unless its format is named. `fp8` (made in flight) and `w4a16` (written by rounding to
nearest, `w4a16.py`) are for a GPU; `float32` is a CPU's, where equality can be had. W4A16's kernels do not take every
size: a model that they refuse is made wider by zeros (`widened.py`), and its row says so. The adapters' weights are
random: what is compared is what two implementations make of them. FP8 has no reference with the same numbers: it is
held against the 16-bit weights, and need not be equal.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import awaited
import behind_the_door
import psutil
from support_page import Agreement, Machine, Row, render

from tuneship.core import hardware
from tuneship.core.errors import PreflightError
from tuneship.core.model_source import BUNDLED_ID, resolve
from tuneship.core.process import descendants, stop_tree, tail
from tuneship.serve import packed, quantized
from tuneship.serve.preflight.base import linear

ROOT = Path(__file__).parents[2]
BASELINES = ROOT / "bench" / "baselines"
PAGE = ROOT / "docs" / "support-matrix.md"

PROMPTS, ANSWER_TOKENS = 12, 16
STREAMS, STREAM_TOKENS = 8, 48
ADAPTERS = ("first", "second")
RANK = 8
LOUD = 0.05
"""Of the random weights: an adapter at 0.01 says what its base says."""
START_S = 600


class Format(NamedTuple):
    """One way to hold a base: the server's arguments, and the dtype of the reference."""

    arguments: tuple[str, ...]
    dtype: str


FORMATS = {
    "float32": Format(("--dtype", "float32"), "float32"),
    "bf16": Format(("--dtype", "bfloat16"), "bfloat16"),
    "nf4": Format(("--dtype", "bfloat16", "--quantization", "nf4"), "bfloat16"),
    "dequantized": Format(("--dtype", "bfloat16", "--quantization", "dequantized"), "bfloat16"),
    "nf4-float32": Format(("--dtype", "float32", "--quantization", "nf4"), "float32"),
    "fp8": Format(("--dtype", "bfloat16", "--quantization", "fp8"), "bfloat16"),
    "w4a16": Format(("--dtype", "bfloat16"), "bfloat16"),
    "nf4-tp2": Format(("--quantization", "nf4", "--extra-arg=--tp", "--extra-arg=2"), "bfloat16"),
}


class Answer(NamedTuple):
    """What a model said to a prompt, greedily."""

    model: str
    prompt_ids: list[int]
    ids: list[int]


def main() -> None:
    """Run the named formats, or write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--formats", default="", help="comma-separated, of: " + ", ".join(FORMATS))
    parser.add_argument("--model", default=BUNDLED_ID)
    parser.add_argument("--out", type=Path, help="default: bench/baselines/support-<machine>.json")
    parser.add_argument("--work", type=Path, help="for adapters, checkpoints and logs; default: gone afterwards")
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    if options.formats:
        out = options.out or BASELINES / f"support-{_machine_name()}.json"
        with tempfile.TemporaryDirectory() as folder:
            _measure(options.formats.split(","), options.model, out, options.work or Path(folder))
    if options.render:
        PAGE.write_text(render(read_all()), encoding="utf-8")
        sys.stdout.write(f"{PAGE.relative_to(ROOT)}\n")


def read_all() -> list[Machine]:
    """Every machine's rows, by the name of its file."""
    files = sorted(BASELINES.glob("support-*.json"))
    return [Machine.model_validate_json(file.read_text(encoding="utf-8")) for file in files]


def _measure(formats: list[str], model: str, out: Path, work: Path) -> None:
    machine = Machine(
        machine=hardware.detect().as_record(),
        versions=hardware.versions((*hardware.TRACKED, "compressed-tensors")),
        model=model,
        rows=Machine.model_validate_json(out.read_text(encoding="utf-8")).rows if out.exists() else [],
    )
    for name in formats:
        served, note = _that_fits(model, work) if name == "w4a16" and hardware.detect().gpus else (model, "")
        base = resolve(served).path
        adapters = _write_adapters(base, work / f"adapters-{base.name}")
        machine = machine.with_row(_row(name, served, base, adapters, work / name).model_copy(update={"note": note}))
        out.write_text(machine.model_dump_json(indent=1) + "\n", encoding="utf-8")
        sys.stdout.write(machine.rows[-1].model_dump_json() + "\n")


def _that_fits(model: str, work: Path) -> tuple[str, str]:
    """(model, note): one whose sizes W4A16's kernels take."""
    base = resolve(model).path
    try:
        packed.require(linear(base))
    except PreflightError as refused:
        return str(_wider(base, work / f"{base.name}-wider")), f"made wider by zeros, because {refused.message}"
    return model, ""


def _row(name: str, model: str, base: Path, adapters: Path, folder: Path) -> Row:
    """Serve one format, ask it, and compare."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    asked = FORMATS[name]
    served = str(_w4a16(base, folder / f"{base.name}-w4a16")) if name == "w4a16" else model
    command = ["tuneship", "serve", served, "--adapters", "ADAPTERS", *asked.arguments]
    about: dict[str, Any] = {
        "format": name,
        "command": shlex.join(command).replace(str(folder), "."),
        "date": datetime.now(UTC).date().isoformat(),
        "study": shlex.join([".venv/bin/python", "bench/studies/support_matrix.py", "--formats", name]),
    }
    try:
        with _server(served, adapters, asked.arguments, folder) as (url, process):
            answers = asyncio.run(_ask_all(url, resolve(served).name))
            tokens_per_s = asyncio.run(_speed(url))
            memory = _memory_bytes(process)
            weights = behind_the_door.allocated_gib(behind_the_door.engine_url(process.pid)).get("weight")
        graphs = _graphs((folder / "engine.log").read_text(errors="replace"))
    except RuntimeError as refused:
        return Row(**about, loads=False, refused=str(refused).replace(str(folder), "."))
    reference = _reference_base(name, base, Path(served), folder)
    agreed = {
        who: _agreement([a for a in answers if a.model == who], reference, adapters, asked.dtype)
        for who in dict.fromkeys(answer.model for answer in answers)
    }
    first, *others = agreed  # the base's answers come first
    apart = all(_differs(answers, *pair) for pair in combinations((first, *others), 2))
    return Row(
        **about, loads=True, base=agreed[first], adapters={name: agreed[name] for name in others}, adapters_apart=apart,
        cuda_graphs=graphs, memory_bytes=memory, weights_gib=weights, tokens_per_s=round(tokens_per_s, 1),
    )  # fmt: skip


@contextmanager
def _server(
    model: str, adapters: Path, arguments: tuple[str, ...], folder: Path
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """(url, process) of a server that is ready; RuntimeError with its own words when it does not start."""
    endpoint, said = folder / "endpoint.json", folder / "output"
    argv = [sys.executable, "-m", "tuneship", "serve", model, "--adapters", str(adapters), *arguments]
    argv += ["--port", "0", "--endpoint-file", str(endpoint), "--log", str(folder / "engine.log")]
    env = {**os.environ, "TUNESHIP_KEYS": str(folder / "keys.toml")}
    with said.open("wb") as output:
        process = subprocess.Popen(argv, stdout=output, stderr=output, cwd=folder, env=env)
    try:
        found = awaited.endpoint(process, endpoint, START_S)
        if found is None:
            raise RuntimeError(_complaint(tail(said, 40)))
        yield found.url, process
    finally:
        stop_tree(process, grace_s=20)


def _complaint(output: str) -> str:
    """The error that it ended with, in one line."""
    found = re.search(r"error: (.*?)(?:\n\s*\n|\nhint:|$)", output, re.DOTALL)
    return " ".join((found[1] if found else output[-300:]).split())


async def _ask_all(url: str, base_name: str) -> list[Answer]:
    """Every model's answers to the same prompts, all of them in flight together."""
    prompts = [f"Question {number}: what should I know about {topic}?" for number, topic in enumerate(_TOPICS)]

    async def ask(session: aiohttp.ClientSession, model: str, text: str) -> Answer:
        body = {
            "model": model, "messages": [{"role": "user", "content": text}], "temperature": 0,
            "max_tokens": ANSWER_TOKENS, "return_token_ids": True,
        }  # fmt: skip
        async with session.post("/v1/chat/completions", json=body) as response:
            answer = await response.json()
            if response.status != 200:
                raise RuntimeError(f"{model} answers {response.status}: {answer}")
        (choice,) = answer["choices"]
        ids = choice.get("token_ids") or choice["response_token_ids"]  # SGLang 0.5.17, 0.5.23
        return Answer(model, choice["prompt_token_ids"], ids[:-1] if choice["finish_reason"] == "stop" else ids)

    timeout = aiohttp.ClientTimeout(total=600)
    connector = aiohttp.TCPConnector(limit=STREAMS)
    async with aiohttp.ClientSession(url, timeout=timeout, connector=connector) as session:
        jobs = [ask(session, model, text) for text in prompts for model in (base_name, *ADAPTERS)]
        return sorted(await asyncio.gather(*jobs), key=lambda answer: (answer.model != base_name, answer.model))


_TOPICS = (
    "bread", "rivers", "a bicycle", "the moon", "old maps", "rain", "a good knife", "bees", "trains", "salt", "glass",
    "small gardens",
)  # fmt: skip


async def _speed(url: str) -> float:
    """Output tokens a second of `STREAMS` streams over both adapters."""

    async def ask(session: aiohttp.ClientSession, index: int) -> int:
        body = {
            "model": ADAPTERS[index % len(ADAPTERS)], "messages": [{"role": "user", "content": f"Tell story {index}."}],
            "temperature": 0, "max_tokens": STREAM_TOKENS, "ignore_eos": True,
        }  # fmt: skip
        async with session.post("/v1/chat/completions", json=body) as response:
            return int((await response.json())["usage"]["completion_tokens"])

    async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(total=600)) as session:
        began = time.perf_counter()
        tokens = sum(await asyncio.gather(*(ask(session, index) for index in range(STREAMS))))
        return tokens / (time.perf_counter() - began)


def _memory_bytes(process: subprocess.Popen[bytes]) -> int:
    """On a GPU what its processes hold of it; on a CPU their share of the machine's memory (PSS)."""
    family = [psutil.Process(process.pid), *descendants(process.pid)]
    if not hardware.detect().gpus:
        return sum(member.memory_full_info().pss for member in family)
    import pynvml  # noqa: PLC0415 - where there is a GPU

    pynvml.nvmlInit()
    return int(pynvml.nvmlDeviceGetMemoryInfo(hardware.visible_gpus()[0]).used)


def _graphs(log: str) -> bool | None:
    """Whether decoding ran in CUDA graphs; None where there are none to have."""
    return bool(re.search(r"Capture \w+ decode cuda graph end", log, re.IGNORECASE)) if hardware.detect().gpus else None


def _reference_base(name: str, base: Path, served: Path, folder: Path) -> Path:
    """The checkpoint that transformers is given: the served weights; for FP8, which lie nowhere, the 16-bit ones."""
    if name.startswith(("nf4", "dequantized")):
        log = (folder / "engine.log").read_text(errors="replace")
        found = re.search(rf"model_path='([^']*base-{name.partition('-')[0]}-[^']*)'", log)
        if not found:
            raise RuntimeError("the engine's log names no base of ours")
        return Path(found[1])
    return served if name == "w4a16" else base


def _agreement(answers: list[Answer], base: Path, adapters: Path, dtype: str) -> Agreement:
    """How far `answers`, all of one model, are what transformers + PEFT says."""
    adapter = adapters / answers[0].model
    theirs = _greedy(base, adapter if adapter.exists() else None, [answer.prompt_ids for answer in answers], dtype)
    pairs = [(answer.ids, ids[: len(answer.ids)]) for answer, ids in zip(answers, theirs, strict=True)]
    same = [next((i for i, (a, b) in enumerate(zip(*pair, strict=False)) if a != b), len(pair[0])) for pair in pairs]
    return Agreement(
        prompts=len(pairs),
        equal=sum(mine == other for mine, other in pairs),
        tokens=sum(len(mine) for mine, _ in pairs),
        tokens_before_first_difference=sum(same),
    )


def _greedy(base: Path, adapter: Path | None, prompts: list[list[int]], dtype: str) -> list[list[int]]:
    import torch  # noqa: PLC0415 - the page is made without it
    from peft import PeftModel  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig  # noqa: PLC0415

    device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = getattr(torch, dtype)
    unpacked = {}
    if quantized.weights(base).method == packed.METHOD:  # PEFT knows no packed layers of it: their values in 16 bits
        unpacked["quantization_config"] = CompressedTensorsConfig(run_compressed=False)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=wanted, device_map={"": device}, **unpacked)
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):  # bitsandbytes' 4-bit layers, which choose a dtype themselves
            layer.compute_dtype, layer.support_avx512bf16_for_cpu = wanted, False
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    found = []
    for ids in prompts:
        tokens = torch.tensor([ids], device=device)
        with torch.no_grad():
            output = model.generate(
                input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=ANSWER_TOKENS, do_sample=False
            )
        found.append(output[0, len(ids) :].tolist())
    return found


def _differs(answers: list[Answer], one: str, other: str) -> bool:
    """Whether two models mostly say something else."""
    mine, theirs = ([answer.ids for answer in answers if answer.model == who] for who in (one, other))
    return sum(a != b for a, b in zip(mine, theirs, strict=True)) > len(mine) / 2


def _write_adapters(base: Path, folder: Path) -> Path:
    """Two adapters of random weights, large enough to be heard."""
    import torch  # noqa: PLC0415 - as above
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    for seed, name in enumerate(ADAPTERS):
        if (folder / name).exists():
            continue
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets, task_type="CAUSAL_LM")
        wrapped = get_peft_model(model, config)
        for key, parameter in wrapped.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=LOUD)
        wrapped.save_pretrained(folder / name)
    return folder


def _wider(base: Path, out: Path) -> Path:
    from widened import write  # noqa: PLC0415 - loads torch

    shutil.rmtree(out, ignore_errors=True)
    return write(base, out, 128)


def _w4a16(base: Path, out: Path) -> Path:
    from w4a16 import write  # noqa: PLC0415 - loads torch

    shutil.rmtree(out, ignore_errors=True)
    return write(base, out)


def _machine_name() -> str:
    """Such as `h100` or `2-cores`, as the other baselines are called."""
    machine = hardware.detect()
    if not machine.gpus:
        return f"{machine.cores}-cores"
    return re.sub(r"[^a-z0-9]+", "-", machine.gpus[0].name.lower().removeprefix("nvidia ")).split("-")[0]


if __name__ == "__main__":
    main()
