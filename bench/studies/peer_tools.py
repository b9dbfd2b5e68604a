"""The load clients that `peers.py` compares: how each is started with one load, and where its output says what.

A figure is compared by what it is, not by its name. "Inter token latency" of GuideLLM and AIPerf is one mean a request;
of SGLang and ours it is the gaps between chunks, pooled (AIPerf's "inter chunk latency"). E2E ends with the stream, for
AIPerf with the last chunk that has text. GuideLLM's percentiles of the mean gap weigh each request by its tokens, which
are the same in all requests here.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tuneship.bench.load.prompts import make_prompt

_UV = (".tools/bin/uv", "uv")
_MS_PER_S = 1e3


class Load(NamedTuple):
    """One level: Poisson arrivals at `rate` a second, or a closed loop of `concurrency`."""

    url: str
    model: str
    tokenizer: str
    """Folder of a tokenizer, for those that count for themselves."""
    input_tokens: int
    output_tokens: int
    requests: int
    """Requests, for those that take a number."""
    duration_s: float
    """Of the sending, for ours."""
    rate: float = 0
    concurrency: int = 0


class Said(NamedTuple):
    """What a client reports. `figures`: by definition (a key of `peers.truths`), p50 and p99 in milliseconds."""

    completed: int
    output_tokens: float
    input_tokens_per_request: float
    output_tokens_per_s: float
    figures: dict[str, tuple[float, float]]
    lag_p99_ms: float | None = None
    """What it says of its own lateness; only ours does."""


class Tool(NamedTuple):
    """One client."""

    name: str
    version: str
    """Empty: of the project's own environment."""
    command: Callable[[str, Load, Path], list[str]]
    """(folder of its environment's programs, load, folder for its output) -> argv."""
    parse: Callable[[Path], Said]
    env: Mapping[str, str] = {}
    left_out: str = ""
    """What it reports that is defined otherwise, hence is not compared."""


def programs(tool: Tool, envs: Path) -> str:
    """The folder of the tool's programs; its environment is made when it is not there (needs the network)."""
    if not tool.version:
        return str(Path(sys.executable).parent)
    folder = envs / f"{tool.name}-{tool.version}"
    if not (folder / "bin" / tool.name).exists():
        uv = next(found for name in _UV if (found := shutil.which(name)))
        subprocess.run([uv, "venv", "--clear", "--python", sys.executable, str(folder)], check=True)
        python = str(folder / "bin" / "python")
        subprocess.run([uv, "pip", "install", "--python", python, f"{tool.name}=={tool.version}"], check=True)
    return str(folder / "bin")


def write_tokenizer(folder: Path) -> str:
    """A tokenizer of one token a byte, for a server that has none; its folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # type: ignore[import-untyped]  # noqa: PLC0415
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={"<|end|>": 0, **{c: i for i, c in enumerate(alphabet, 1)}}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")  # noqa: S106
    fast.save_pretrained(folder)
    return str(folder)


def _ours(programs: str, load: Load, out: Path) -> list[str]:
    level = ["--concurrency", f"{load.concurrency}"] if load.concurrency else ["--rates", f"{load.rate:.6g}"]
    return [
        *(f"{programs}/python", "-m", "tuneship", "bench", "load", load.url, "--model", load.model, *level),
        *("--duration-s", f"{load.duration_s:.6g}", "--input-tokens", f"{_words(load)}"),
        *("--output-tokens", f"{load.output_tokens}", "--out", str(out / "ours")),
    ]


def _words(load: Load) -> int:
    """Ours counts a prompt in words: as many as are `input_tokens` to the tokenizer that the others count with."""
    from tokenizers import Tokenizer  # noqa: PLC0415

    sample = make_prompt(1000, "peers")
    per_word = len(Tokenizer.from_file(str(Path(load.tokenizer) / "tokenizer.json")).encode(sample).ids) / 1000
    return max(1, round(load.input_tokens / per_word))


def _parse_ours(out: Path) -> Said:
    level = json.loads((out / "ours" / "report.json").read_text(encoding="utf-8"))["load"][0]
    names = {"ttft": "ttft_ms", "itl": "itl_ms", "e2e": "e2e_ms"}
    return Said(
        level["completed"],
        level["output_tokens"],
        level["input_tokens"] / level["completed"],
        level["output_tokens_per_s"],
        {name: (level[field]["p50"], level[field]["p99"]) for name, field in names.items()},
        level["client"]["lag_p99_ms"],
    )


def _sglang(programs: str, load: Load, out: Path) -> list[str]:
    level = ["--max-concurrency", f"{load.concurrency}"] if load.concurrency else ["--request-rate", f"{load.rate:.6g}"]
    return [
        *(f"{programs}/python", "-m", "sglang.bench_serving", "--backend", "sglang-oai-chat"),
        *("--base-url", load.url, "--model", load.model, "--tokenizer", load.tokenizer),
        *("--dataset-name", "random-ids", "--random-range-ratio", "1", "--random-input-len", f"{load.input_tokens}"),
        *("--random-output-len", f"{load.output_tokens}", "--num-prompts", f"{load.requests}", *level),
        *("--warmup-requests", "0", "--disable-tqdm", "--output-file", str(out / "sglang.jsonl")),
    ]


def _parse_sglang(out: Path) -> Said:
    said = json.loads((out / "sglang.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    names = {"ttft": "ttft_ms", "itl": "itl_ms", "e2e": "e2e_latency_ms"}
    return Said(
        said["completed"],
        said["total_output_tokens"],
        said["total_input_tokens"] / said["completed"],
        said["output_throughput"],
        {name: (said[f"median_{field}"], said[f"p99_{field}"]) for name, field in names.items()},
    )


def _guidellm(programs: str, load: Load, out: Path) -> list[str]:
    level = f"kind=concurrent,streams={load.concurrency}" if load.concurrency else f"kind=poisson,rate={load.rate:.6g}"
    return [
        *(f"{programs}/guidellm", "run", "--backend", f"kind=openai_http,target={load.url},model={load.model}"),
        *("--profile", level, "--constraint", f"kind=max_requests,count={load.requests}"),
        *("--tokenizer", f"kind=huggingface_auto,model={load.tokenizer}", "--data"),
        f"kind=synthetic_text,prompt_tokens={load.input_tokens},output_tokens={load.output_tokens}",
        *("--output", f"kind=json,path={out / 'guidellm.json'}", "--disable-console"),
    ]


def _parse_guidellm(out: Path) -> Said:
    found = json.loads((out / "guidellm.json").read_text(encoding="utf-8"))["benchmarks"][0]["metrics"]
    names = {
        "ttft": ("time_to_first_token_ms", 1),
        "itl_mean": ("inter_token_latency_ms", 1),
        "e2e": ("request_latency", _MS_PER_S),
    }
    percentiles = {name: found[field]["successful"]["percentiles"] for name, (field, _) in names.items()}
    return Said(
        found["request_totals"]["successful"],
        found["output_token_count"]["successful"]["total_sum"],
        found["prompt_token_count"]["successful"]["mean"],
        found["output_tokens_per_second"]["successful"]["mean"],
        {n: (percentiles[n]["p50"] * scale, percentiles[n]["p99"] * scale) for n, (_, scale) in names.items()},
    )


def _aiperf(programs: str, load: Load, out: Path) -> list[str]:
    poisson = ["--request-rate", f"{load.rate:.6g}", "--arrival-pattern", "poisson"]
    return [
        *(f"{programs}/aiperf", "profile", "--model-names", load.model, "--url", load.url, "--endpoint-type", "chat"),
        *("--streaming", "--tokenizer", load.tokenizer, "--use-server-token-count"),
        *(["--concurrency", f"{load.concurrency}"] if load.concurrency else poisson),
        *("--request-count", f"{load.requests}", "--prompt-input-tokens-mean", f"{load.input_tokens}"),
        *("--prompt-output-tokens-mean", f"{load.output_tokens}", "--extra-inputs", "ignore_eos:true"),
        *("--extra-inputs", "temperature:0", "--no-server-metrics", "--no-gpu-telemetry", "--ui", "none"),
        *("--workers-max", "1", "--record-processors", "1", "--export-level", "summary"),
        *("--artifact-dir", str(out / "aiperf")),
    ]


def _parse_aiperf(out: Path) -> Said:
    found: dict[str, Any] = json.loads((out / "aiperf" / "profile_export_aiperf.json").read_text(encoding="utf-8"))
    names = {
        "ttft": "time_to_first_token",
        "itl": "inter_chunk_latency",
        "itl_mean": "inter_token_latency",
        "e2e_text": "request_latency",
    }
    assert all(found[field]["unit"] == "ms" for field in names.values())
    return Said(
        int(found["request_count"]["avg"]),
        found["total_output_tokens"]["avg"],
        found["usage_prompt_tokens"]["avg"],
        found["output_token_throughput"]["avg"],
        {name: (found[field]["p50"], found[field]["p99"]) for name, field in names.items()},
    )


_OFFLINE = {"HF_HUB_OFFLINE": "1"}
TOOLS = {
    tool.name: tool
    for tool in (
        Tool("ours", "", _ours, _parse_ours),
        Tool("sglang", "", _sglang, _parse_sglang, _OFFLINE),
        # One core: one worker process, where its default is ten.
        Tool(
            *("guidellm", "0.8.1", _guidellm, _parse_guidellm, {**_OFFLINE, "GUIDELLM__MAX_WORKER_PROCESSES": "1"}),
            left_out="gaps between chunks: it keeps none, only a mean a request, so stalls that even out are not seen",
        ),
        # Not offline: it then takes a tokenizer's folder for a hub's name.
        Tool("aiperf", "0.13.0", _aiperf, _parse_aiperf),
    )
}
