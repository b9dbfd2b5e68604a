"""The same load on the same server by our client and by SGLang's own benchmark: do the figures agree (or why not).

The two take turns on a running server (ours, SGLang's, SGLang's, ours, ...), or with --together load it at the same
time, so that both see the same moods of it: its own noise from run to run is often more than 5 %. Both send the same:

- prompts: the same words, in another order in every run. So each run has as many tokens, and none is answered from the
  server's prefix cache. SGLang's benchmark reads them from a file (`--dataset-name openai`).
- request: chat completions, streamed, greedy, `ignore_eos`, the same number of output tokens, usage asked for.
- arrivals: SGLang draws them from its seed; ours leave at the same times, drawn again from it. Or a fixed number is in
  flight. No run has a warm-up of its own: our client sends every level once before, and that does not count.

The engine's own counters (`/metrics`) say how many prompt and output tokens each run was, and how many prompt tokens
came from the cache (the template's beginning). Where tokens differ, or a request failed, nothing is compared, and the
exit code is 1. Compared are the figures that both define alike (SGLang 0.5.17), as medians:

- TTFT, TPOT, E2E: from send. SGLang opens a connection for every request and counts that too.
- ITL: gaps between chunks with text. Chunks that arrive together are 0 apart to us, and as far apart to SGLang as it
  takes to parse one: where the median is that, it is not compared. (With speculative decoding SGLang divides a gap by
  the chunk's tokens: no comparison then.)
- output tokens per second, in a closed loop. In an open one SGLang waits for one gap more after its last request.

Not compared: tails, where SGLang's client, busier than ours, measures itself too; anything from the schedule, which it
does not know.

A figure's ratio, tuneship / sglang, is the geometric mean over the rounds with its 95 % interval. `agrees` is yes when
the interval lies within 5 %, no when it lies outside, else it cannot be told from noise. `spread` is each tool against
itself, from run to run: standard deviation over mean.

    .venv/bin/tuneship serve bundled:smollm2-135m-instruct --port 31000 &
    .venv/bin/python bench/studies/cross_check.py --url http://127.0.0.1:31000 --tokenizer MODEL_FOLDER --rates 1
    .venv/bin/python bench/studies/cross_check.py --url ... --tokenizer MODEL_FOLDER --concurrency 2 --together
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import secrets
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

from tuneship.bench.load import engine_metrics, metrics, processes
from tuneship.bench.load.prompts import make_prompt
from tuneship.bench.load.workload import Request
from tuneship.bench.target import resolve
from tuneship.core import hardware

LATENCIES = ("ttft_ms_p50", "tpot_ms_p50", "itl_ms_p50", "e2e_ms_p50")
THROUGHPUT = "output_tokens_per_s"
WITHIN = 0.05
OURS, THEIRS = "tuneship", "sglang"
_DRAIN_S = 600
_BEGINS = "Starting main benchmark run"
"""What SGLang's benchmark prints a second before it sends."""
_ENGINE = {
    "engine_prompt_tokens": "sglang:prompt_tokens_total",
    "engine_output_tokens": "sglang:generation_tokens_total",
    "engine_cached_tokens": "sglang:cached_tokens_total",
}
Figures = dict[str, float]


class Level(NamedTuple):
    """One load: open at `rate` requests per second, or closed with `concurrency` in flight."""

    requests: int
    input_words: int
    output_tokens: int
    seed: int
    rate: float = math.inf
    concurrency: int = 0

    @property
    def name(self) -> str:
        """As a reader calls it."""
        return f"{self.concurrency} in flight" if self.concurrency else f"{self.rate:g}/s"


class Server(NamedTuple):
    """What both ask; `tokenizer` is for SGLang's client, which cannot do without."""

    url: str
    model: str
    tokenizer: str


Round = Callable[[Server, Level, str, int], dict[str, Figures]]
"""Both once: (server, level, salt of the prompts, number of the round) -> {client: figures}."""


def main() -> None:
    """Run every level by all clients in turn; what they found goes to `--out`, a table to stdout."""
    options = _options()
    target = resolve(options.url, options.model)
    server = Server(target.url, target.models[0], options.tokenizer)
    if engine_metrics.scrape(server.url) == engine_metrics.EMPTY:
        sys.exit(f"{server.url} has no /metrics: nobody counts both sides' tokens")
    run = run_together if options.together else run_in_turn
    levels = [run_level(server, level, options.rounds, run) for level in _levels(options)]
    found = {
        "measured": "each side: median over its runs; ratio: tuneship / sglang, geometric mean over the rounds",
        "command": shlex.join(["python", "bench/studies/cross_check.py", *sys.argv[1:]]),
        "hardware": hardware.detect().as_record(),
        "versions": hardware.versions(),
        "levels": levels,
    }
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for level in levels:
        _show(level)
    if problems := [problem for level in levels for problem in level["problems"]]:
        sys.exit("not the same load: " + "; ".join(problems))


def run_level(server: Server, level: Level, rounds: int, run: Round) -> dict[str, Any]:
    """`rounds` times both; the runs and what follows from them."""
    salt = secrets.token_hex(4)
    _ours(server, level, _prompts(level, f"{salt} warm-up"))
    runs: dict[str, list[Figures]] = {OURS: [], THEIRS: []}
    for number in range(rounds):
        for client, figures in run(server, level, f"{salt} {number}", number).items():
            runs[client].append(figures)
            print(level.name, client, {name: round(value, 3) for name, value in figures.items()}, file=sys.stderr)
    problems = _problems(level, runs)
    names = () if problems else (*LATENCIES, THROUGHPUT) if level.concurrency else LATENCIES
    pairs = {name: [[run[name] for run in runs[client]] for client in (OURS, THEIRS)] for name in names}
    return {
        "level": level.name,
        "load": {name: value for name, value in level._asdict().items() if value != math.inf},
        "problems": problems,
        "figures": {name: _figure(*both) for name, both in pairs.items() if min(map(min, both)) > 0},
        "runs": runs,
    }


def run_in_turn(server: Server, level: Level, salt: str, number: int) -> dict[str, Figures]:
    """Each alone, the other first in every second round."""
    found = {}
    for client in (OURS, THEIRS) if number % 2 == 0 else (THEIRS, OURS):
        measure = _ours if client == OURS else _theirs
        before = engine_metrics.scrape(server.url)
        figures = measure(server, level, _prompts(level, f"{salt} {client}"))
        found[client] = figures | _engine_counted(server, before, 1)
    return found


def run_together(server: Server, level: Level, salt: str, _number: int) -> dict[str, Figures]:
    """Both at once, each with the whole load; half of what the engine counts is each one's."""
    ours: list[Figures] = []
    before = engine_metrics.scrape(server.url)
    theirs = _theirs(
        server,
        level,
        _prompts(level, f"{salt} {THEIRS}"),
        lambda: ours.append(_ours(server, level, _prompts(level, f"{salt} {OURS}"))),
    )
    counted = _engine_counted(server, before, 2)
    return {OURS: ours[0] | counted, THEIRS: theirs | counted}


def _engine_counted(server: Server, before: engine_metrics.Scrape, clients: int) -> Figures:
    counted = engine_metrics.change(before, engine_metrics.scrape(server.url))
    return {name: _sum(counted, metric) / clients for name, metric in _ENGINE.items()}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="a running server's URL, or its endpoint.json")
    parser.add_argument("--model", default="", help="the name to send; default: the first that the server lists")
    parser.add_argument("--tokenizer", required=True, help="folder of the served model, for SGLang's client")
    parser.add_argument("--rates", type=float, nargs="*", default=[], help="requests per second, one level each")
    parser.add_argument("--concurrency", type=int, nargs="*", default=[], help="in flight, one level each")
    parser.add_argument("--requests", type=int, default=60, help="a run")
    parser.add_argument("--input-words", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0, help="of words and arrivals")
    parser.add_argument("--together", action="store_true", help="both at once instead of in turn")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not options.rates and not options.concurrency:
        parser.error("name --rates or --concurrency")
    return options


def _levels(options: argparse.Namespace) -> list[Level]:
    level = Level(options.requests, options.input_words, options.output_tokens, options.seed)
    return [
        *(level._replace(rate=rate) for rate in options.rates),
        *(level._replace(concurrency=number) for number in options.concurrency),
    ]


def _prompts(level: Level, run: str) -> list[str]:
    """One a request: the same words in every run but in another order, so that `run` alone decides what is cached.

    The first word stays first: without a space before it, it may be another number of tokens.
    """
    prompts = []
    for index in range(level.requests):
        first, *words = make_prompt(level.input_words, f"{level.seed} {index}").split()
        random.Random(f"{run} {index}").shuffle(words)
        prompts.append(" ".join([first, *words]))
    return prompts


def _at_s(level: Level) -> list[float]:
    """When each request leaves: as SGLang's benchmark draws it from its seed."""
    if level.concurrency:
        return [0.0] * level.requests
    gaps = np.random.RandomState(level.seed).exponential(1 / level.rate, level.requests - 1)  # their generator
    return [0.0, *(float(at_s) for at_s in np.cumsum(gaps))]


def _ours(server: Server, level: Level, prompts: Sequence[str]) -> Figures:
    requests = [
        Request(at_s, server.model, [{"role": "user", "content": prompt}], level.output_tokens)
        for at_s, prompt in zip(_at_s(level), prompts, strict=True)
    ]
    time.sleep(1)  # as theirs does before it sends
    recording = processes.run(server.url, "", requests, drain_s=_DRAIN_S, concurrency=level.concurrency)
    result = metrics.summarise(
        recording,
        workload=level.name,
        model=server.model,
        arrivals="closed" if level.concurrency else "trace",
        rate=level.rate,
        concurrency=level.concurrency,
    )
    if not (result.ttft_ms and result.tpot_ms and result.itl_ms and result.e2e_ms):
        sys.exit(f"our client got no answer: {result.errors}")
    return {
        "ttft_ms_p50": result.ttft_ms.p50,
        "tpot_ms_p50": result.tpot_ms.p50,
        "itl_ms_p50": result.itl_ms.p50,
        "e2e_ms_p50": result.e2e_ms.p50,
        "output_tokens_per_s": result.output_tokens_per_s,
        "duration_s": result.duration_s,
        "completed": result.completed,
        "input_tokens": result.input_tokens,
        "output_tokens": result.output_tokens,
        "client_lag_p99_ms": result.client.lag_p99_ms,
    }


def _theirs(server: Server, level: Level, prompts: Sequence[str], beside: Callable[[], None] | None = None) -> Figures:
    """`beside` is called a second before theirs sends, which is when ours begins."""
    row: dict[str, Any] = {"max_tokens": level.output_tokens, "ignore_eos": True, "temperature": 0}
    # Without usage it would take the number of output tokens that it asked for.
    row["stream_options"] = {"include_usage": True}
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "prompts.jsonl", Path(folder) / "answer.jsonl"
        rows = ({"messages": [{"role": "user", "content": prompt}], **row} for prompt in prompts)
        asked.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        said = _run_theirs(
            answer,
            beside,
            *("--backend", "sglang-oai-chat", "--base-url", server.url, "--model", server.model),
            *("--tokenizer", server.tokenizer, "--dataset-name", "openai", "--dataset-path", str(asked)),
            *("--num-prompts", str(level.requests), "--seed", str(level.seed), "--warmup-requests", "0"),
            *("--request-rate", f"{level.rate!r}"),
            *(("--max-concurrency", str(level.concurrency)) if level.concurrency else ()),
        )
    return {
        "ttft_ms_p50": said["median_ttft_ms"],
        "tpot_ms_p50": said["median_tpot_ms"],
        "itl_ms_p50": said["median_itl_ms"],
        "e2e_ms_p50": said["median_e2e_latency_ms"],
        "output_tokens_per_s": said["output_throughput"],
        "duration_s": said["duration"],
        "completed": said["completed"],
        "output_tokens": said["total_output_tokens"],
    }


def _run_theirs(answer: Path, beside: Callable[[], None] | None, *arguments: str) -> dict[str, Any]:
    argv = [sys.executable, "-m", "sglang.benchmark.serving", *arguments]
    argv += ["--disable-tqdm", "--output-file", str(answer)]
    # The tokenizer is a folder; it looks the model's name up on the hub too, only to warn about its template.
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    with (
        tempfile.TemporaryFile("w+") as complaints,
        subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=complaints, text=True, env=env) as process,
    ):
        assert process.stdout
        said_so_far = ""
        for line in process.stdout:
            said_so_far += line
            if beside and _BEGINS in line:
                beside()
        if process.wait():
            complaints.seek(0)
            sys.exit(f"SGLang's benchmark failed:\n{said_so_far[-2000:]}\n{complaints.read()[-4000:]}")
    said: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return said


def _problems(level: Level, runs: dict[str, list[Figures]]) -> list[str]:
    """Why these runs were not the same load; empty when they were."""
    every = [run for client in runs.values() for run in client]
    prompts = {run[name] for run in every for name in ("input_tokens", "engine_prompt_tokens") if name in run}
    outputs = {run[name] for run in every for name in ("output_tokens", "engine_output_tokens")}
    wanted = level.requests * level.output_tokens
    return [
        *(["a request failed"] if any(run["completed"] != level.requests for run in every) else []),
        *([f"prompt tokens differ: {sorted(prompts)}"] if len(prompts) > 1 else []),
        *([f"output tokens are not {wanted}: {sorted(outputs)}"] if outputs != {wanted} else []),
    ]


def _figure(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    logs = [math.log(a / b) for a, b in zip(ours, theirs, strict=True)]
    mean = statistics.fmean(logs)
    half = _half_width(logs)
    low, high = math.exp(mean - half), math.exp(mean + half)
    inside, outside = low >= 1 - WITHIN and high <= 1 + WITHIN, low > 1 + WITHIN or high < 1 - WITHIN
    return {
        "tuneship": round(statistics.median(ours), 3),
        "sglang": round(statistics.median(theirs), 3),
        "ratio": round(math.exp(mean), 4),
        "ci95": [round(low, 4), round(high, 4)] if math.isfinite(half) else None,
        "spread": [round(_spread(ours), 4), round(_spread(theirs), 4)],
        "agrees": "yes" if inside else "no" if outside else "cannot tell",
    }


def _half_width(logs: Sequence[float]) -> float:
    """Of the 95 % interval of their mean; infinite for one."""
    if len(logs) < 2:
        return math.inf
    return float(stats.t.ppf(0.975, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) / statistics.fmean(values) if len(values) > 1 else 0.0


def _sum(counted: Figures, metric: str) -> float:
    """Over its kinds: `sglang:cached_tokens_total{cache_source=device}` and others."""
    return sum(value for name, value in counted.items() if name.partition("{")[0] == metric)


def _show(level: dict[str, Any]) -> None:
    for name, figure in level["figures"].items():
        interval = "-".join(f"{end:.3f}" for end in figure["ci95"] or ())
        print(
            f"{level['level']:14} {name:20} {figure['tuneship']:10.2f} {figure['sglang']:10.2f}  ratio"
            f" {figure['ratio']:.3f} [{interval}]  spread {figure['spread'][0]:.1%} {figure['spread'][1]:.1%}"
            f"  {figure['agrees']}"
        )


if __name__ == "__main__":
    main()
