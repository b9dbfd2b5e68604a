"""The same load on the same server by our client and by SGLang's own benchmark: do the figures agree (or why not).

Both clients offer the same load (Poisson arrivals at one rate, fixed lengths, greedy, `ignore_eos`) to one running
server, in turn: ours, SGLang's, SGLang's, ours, and so on, so that a server that drifts is slow for both. What is
compared are medians over the rounds, and only figures whose definitions agree: TTFT, TPOT, ITL, E2E medians (from send)
and output tokens per second. Prompts differ in content: SGLang draws random token ids, we draw common words; so each
side's input tokens are recorded beside the figures. Arrivals are drawn by each client's own generator.

Not compared: tails (SGLang's arrivals are relative sleeps, which drift, and its timer starts after its concurrency
gate), and anything measured from the schedule, which SGLang's benchmark does not know.

    .venv/bin/tuneship serve bundled:smollm2-135m-instruct --port 31000 &
    .venv/bin/python bench/studies/cross_check.py http://127.0.0.1:31000 --tokenizer FOLDER_OF_THE_MODEL --rate 2
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tuneship.bench.target import resolve
from tuneship.core import hardware
from tuneship.core.report import read_report


class Load(NamedTuple):
    """The load that both offer."""

    url: str
    model: str
    tokenizer: str
    rate: float
    duration_s: float
    input_tokens: int
    output_tokens: int


Figures = dict[str, float]
NAMES = ("ttft_ms_p50", "tpot_ms_p50", "itl_ms_p50", "e2e_ms_p50", "output_tokens_per_s")


def main() -> None:
    """Run both in turn and write what they found as JSON on stdout, or into `--out`."""
    options = _options()
    model = options.model or resolve(options.url).models[0]
    load = Load(
        options.url,
        model,
        options.tokenizer,
        options.rate,
        options.duration_s,
        options.input_tokens,
        options.output_tokens,
    )
    rounds: dict[str, list[Figures]] = {"tuneship": [], "sglang": []}
    clients: dict[str, Callable[[Load, Path, int], Figures]] = {"tuneship": _ours, "sglang": _theirs}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            order = ("tuneship", "sglang") if number % 2 == 0 else ("sglang", "tuneship")
            for name in order:
                figures = clients[name](load, Path(folder) / f"{name}-{number}", number)
                rounds[name].append(figures)
                print(name, figures, file=sys.stderr, flush=True)
    machine = hardware.detect()
    found = {
        "measured": "medians over the rounds; ratio is tuneship / sglang",
        "command": shlex.join(["python", "bench/studies/cross_check.py", *sys.argv[1:]]),
        "hardware": machine.as_record(),
        "versions": hardware.versions(),
        "load": load._asdict() | {"url": "", "tokenizer": Path(load.tokenizer).name},
        "figures": {name: _compare(rounds, name) for name in (*NAMES, "input_tokens")},
        "rounds": rounds,
    }
    text = json.dumps(found, indent=1)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--tokenizer", required=True, help="folder of the served model, for SGLang's client")
    parser.add_argument("--model", default="")
    parser.add_argument("--rate", type=float, default=4)
    parser.add_argument("--duration-s", type=float, default=20)
    parser.add_argument("--input-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def _compare(rounds: dict[str, list[Figures]], name: str) -> Figures:
    ours, theirs = (statistics.median(r[name] for r in rounds[side]) for side in ("tuneship", "sglang"))
    return {"tuneship": round(ours, 3), "sglang": round(theirs, 3), "ratio": round(ours / theirs, 4)}


def _ours(load: Load, folder: Path, _seed: int) -> Figures:
    _run(
        *("tuneship", "bench", "load", load.url, "--model", load.model, "--rates", f"{load.rate:g}"),
        *("--duration-s", f"{load.duration_s:g}", "--input-tokens", str(load.input_tokens)),
        *("--output-tokens", str(load.output_tokens), "--out", str(folder)),
    )
    (level,) = read_report(folder / "report.json").load
    assert level.ttft_ms is not None
    assert level.tpot_ms is not None
    assert level.itl_ms is not None
    assert level.e2e_ms is not None
    return {
        "ttft_ms_p50": level.ttft_ms.p50,
        "tpot_ms_p50": level.tpot_ms.p50,
        "itl_ms_p50": level.itl_ms.p50,
        "e2e_ms_p50": level.e2e_ms.p50,
        "output_tokens_per_s": level.output_tokens_per_s,
        "completed": level.completed,
        "input_tokens": level.input_tokens / level.completed,
        "client_lag_p99_ms": level.client.lag_p99_ms,
    }


def _theirs(load: Load, file: Path, seed: int) -> Figures:
    count = max(1, round(load.rate * load.duration_s))
    _run(
        *("sglang.benchmark.serving", "--backend", "sglang-oai-chat", "--base-url", load.url, "--model", load.model),
        *("--tokenizer", load.tokenizer, "--dataset-name", "random-ids", "--random-range-ratio", "1"),
        *("--random-input-len", str(load.input_tokens), "--random-output-len", str(load.output_tokens)),
        *("--num-prompts", str(count), "--request-rate", f"{load.rate:g}", "--seed", str(seed)),
        *("--temperature", "0", "--disable-tqdm", "--output-file", str(file)),
    )
    said = json.loads(file.read_text(encoding="utf-8").splitlines()[-1])
    return {
        "ttft_ms_p50": said["median_ttft_ms"],
        "tpot_ms_p50": said["median_tpot_ms"],
        "itl_ms_p50": said["median_itl_ms"],
        "e2e_ms_p50": said["median_e2e_latency_ms"],
        "output_tokens_per_s": said["output_throughput"],
        "completed": said["completed"],
        "input_tokens": said["total_input_tokens"] / said["completed"],
    }


def _run(module: str, *arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{module} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


if __name__ == "__main__":
    main()
