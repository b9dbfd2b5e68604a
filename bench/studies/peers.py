"""Our load client beside SGLang's benchmark, GuideLLM and AIPerf: what each says, what it costs, how much it holds.

All load one server whose schedule is known (`schedule_server.py`): Poisson arrivals at the rate that keeps `--streams`
answers in flight on the mean, 20 chunks a second each. The client has one core, the server another. Three findings:

- **right**: p50 and p99 as the tool says them beside the server's notes, by the tool's own definition of each
  (`peer_tools.py`); right is within 5 % or 2 ms.
- **CPU per output token**: of the whole process tree, the difference between a load and one of three times the length,
  divided by the tokens between them. So imports and set-up are out, but work on the results is in.
- **most streams a core**: the most in flight (doubled or halved from 64, then bisected to within a quarter) at which,
  in one of two tries, all requests complete and p99 TTFT and ITL are within 2 ms of the notes; where a tool has no
  gaps, its mean gap stands for them, which is easier.

Not measured: multi-core scaling, prompts longer than `--input-tokens`, and what a tool does before it sends. A tool's
environment is made on first use (network); it takes about 17 minutes. Every run has a time limit.

    .venv/bin/python bench/studies/peers.py --out bench/baselines/peers-2-cores.json

Against a real server there is no truth, and the tools' figures stand side by side, in a closed loop of `--streams` and,
with `--rate`, under Poisson arrivals; ours goes first, and the others send as many requests as it did. Prompts differ
in content and a little in length (the table tells; SGLang's count is its own, without the chat template):

    .venv/bin/python bench/studies/peers.py --url http://127.0.0.1:30000 --model NAME --tokenizer FOLDER --streams 4
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from peer_tools import TOOLS, Load, Said, Tool, programs, write_tokenizer
from schedule_server import FIRST_S, GAP_MS, MODEL, Notes, collect_notes, running_server
from truth import Figure

from tuneship.bench.load import metrics
from tuneship.core import hardware
from tuneship.core.process import kill_all, spawn, stop_tree, tail

LIMIT_MS = 2.0
LEAST, MOST = 4, 4096
_BISECT_TO = 1.25
_WAVES = (1, 3)
_START_LIMIT_S = 120
_PR_SET_CHILD_SUBREAPER = 36


class Run(NamedTuple):
    """One tool under one load; `said` is None when it failed or was too late."""

    said: Said | None
    cpu_s: float
    wall_s: float
    notes: Notes
    failure: str = ""


class Bench(NamedTuple):
    """What all runs share."""

    envs: Path
    client_core: int
    chunks: int
    input_tokens: int
    tokenizer: str


def main() -> None:
    """Measure all tools, print a table, write JSON."""
    options = _options()
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)  # a tool's orphans become our children, and are counted
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        sys.exit("the client and the server need a core each, and this process may use one")
    server_core, client_core = cores[0], cores[-1]
    os.sched_setaffinity(0, {server_core})
    tools = [TOOLS[name] for name in options.tools]
    for tool in tools:
        programs(tool, options.envs)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = options.tokenizer or write_tokenizer(Path(folder))
        bench = Bench(options.envs, client_core, options.chunks, options.input_tokens, tokenizer)
        if options.url:
            rows = _side_by_side(options, bench, tools)
        else:
            with running_server(server_core) as url:
                rows = [_measure(bench, url, tool, options.streams, most=not options.no_most) for tool in tools]
    found: dict[str, Any] = {
        "command": shlex.join([".venv/bin/python", *sys.argv]),
        "hardware": hardware.detect().as_record(),
        "versions": hardware.versions(("tuneship", "sglang", "aiohttp", "uvloop", "msgspec"))
        | {tool.name: tool.version for tool in tools if tool.version},
        "load": {"chunks_per_answer": options.chunks, "input_tokens": options.input_tokens}
        | ({} if options.url else {"gap_ms": GAP_MS, "streams": options.streams, "limit_ms": LIMIT_MS}),
        "tools": rows,
    }
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(_table_side_by_side(rows) if options.url else _table(rows))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=list(TOOLS))
    parser.add_argument("--streams", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--chunks", type=int, default=100, help="tokens an answer")
    parser.add_argument("--input-tokens", type=int, default=32)
    parser.add_argument("--no-most", action="store_true", help="do not look for the most streams")
    parser.add_argument("--envs", type=Path, default=Path.home() / ".cache" / "tuneship" / "peers")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--url", default="", help="of a real server")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--tokenizer", default="", help="folder of the real server's model")
    parser.add_argument("--rate", type=float, default=0, help="of a real server: Poisson arrivals too")
    parser.add_argument("--duration-s", type=float, default=20, help="of a level against a real server")
    options = parser.parse_args()
    if options.url and not options.tokenizer:
        parser.error("--url needs --tokenizer")
    return options


def _measure(bench: Bench, url: str, tool: Tool, streams: list[int], *, most: bool) -> dict[str, Any]:
    levels = []
    for number in streams:
        short, long = (_run(bench, tool, _steady(bench, url, number, waves)) for waves in _WAVES)
        levels.append(_level(number, short, long))
        print(tool.name, levels[-1], file=sys.stderr, flush=True)
    row: dict[str, Any] = {"tool": tool.name, "version": tool.version, "not_compared": tool.left_out, "levels": levels}
    if most:
        tried: dict[int, dict[str, Any]] = {}

        def holds(number: int) -> bool:
            for _ in range(2):  # one stall of the machine is no verdict on the tool
                tried[number] = _held(_run(bench, tool, _steady(bench, url, number, 2, bench.chunks * 3 // 5)))
                print(tool.name, number, tried[number], file=sys.stderr, flush=True)
                if tried[number]["held"]:
                    return True
            return False

        row["most_streams"] = most_streams(holds)
        row["tried"] = {str(number): tried[number] for number in sorted(tried)}
    return row


def _steady(bench: Bench, url: str, streams: int, waves: int, chunks: int = 0) -> Load:
    """As many requests as make `waves` times `streams`, at the rate at which so many answers overlap on the mean."""
    chunks = chunks or bench.chunks
    answer_s = FIRST_S + chunks * GAP_MS / 1e3
    return Load(
        *(url, MODEL, bench.tokenizer, bench.input_tokens, chunks, waves * streams, waves * answer_s),
        rate=streams / answer_s,
    )


def _run(bench: Bench, tool: Tool, load: Load) -> Run:
    """Run the tool once, on its core, and count the processor time of all that it started."""
    limit_s = _START_LIMIT_S + 3 * load.duration_s
    if load.model == MODEL:
        collect_notes(load.url)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        argv = tool.command(programs(tool, bench.envs), load, Path(folder))
        before, start_s = _children_cpu_s(), time.perf_counter()
        with log.open("wb") as output, _on_core(bench.client_core):
            process = spawn(argv, env=tool.env, stdout=output)
        strangers = set(psutil.Process().children()) - {psutil.Process(process.pid)}  # the server
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            wall_s = time.perf_counter() - start_s
            stop_tree(process, grace_s=5)
            kill_all(set(psutil.Process().children(recursive=True)) - strangers)
        cpu_s = _children_cpu_s() - before
        notes = collect_notes(load.url) if load.model == MODEL else {}
        if code == 0:
            with contextlib.suppress(
                OSError, KeyError, IndexError, TypeError, ZeroDivisionError
            ):  # nothing was measured
                return Run(tool.parse(Path(folder)), cpu_s, wall_s, notes)
        why = f"not done after {limit_s:.0f} s" if code is None else f"exit code {code}: {tail(log, 5)}"
        return Run(None, cpu_s, wall_s, notes, why)


@contextlib.contextmanager
def _on_core(core: int) -> Iterator[None]:
    """What is started in here may run on that core and on no other."""
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def truths(notes: Notes, said: Said) -> dict[str, list[float]]:
    """Every latency in ms by definition, of as many requests as the tool reports: its warm-up came before them."""
    measured = sorted(notes.values())[-said.completed :]
    return {
        "ttft": [(note[1] - note[0]) * 1e3 for note in measured],
        "itl": [(later - earlier) * 1e3 for note in measured for earlier, later in pairwise(note[1:-1])],
        "itl_mean": [(note[-2] - note[1]) / (len(note) - 3) * 1e3 for note in measured],
        "e2e": [(note[-1] - note[0]) * 1e3 for note in measured],
        "e2e_text": [(note[-2] - note[0]) * 1e3 for note in measured],
    }


def figures(run: Run) -> list[Figure]:
    """What the tool says beside what the server noted."""
    assert run.said
    found = []
    for name, values in truths(run.notes, run.said).items():
        noted = metrics.percentiles(values)
        if noted and name in run.said.figures:
            p50, p99 = run.said.figures[name]
            found += [Figure(f"{name}_p50", noted.p50, p50), Figure(f"{name}_p99", noted.p99, p99)]
    return found


def _level(streams: int, short: Run, long: Run) -> dict[str, Any]:
    if not (short.said and long.said):
        return {"streams": streams, "failure": short.failure or long.failure}
    tokens = [sum(len(note) - 2 for note in run.notes.values()) for run in (short, long)]
    return {
        "streams": streams,
        "cpu_us_per_token": round((long.cpu_s - short.cpu_s) / (tokens[1] - tokens[0]) * 1e6, 1),
        "cpu_s": [round(run.cpu_s, 2) for run in (short, long)],
        "wall_s": [round(run.wall_s, 1) for run in (short, long)],
        "tokens": tokens,
        "completed": long.said.completed,
        "lag_p99_ms": long.said.lag_p99_ms,
        "right": all(figure.right for figure in figures(long)),
        "figures": {
            f.name: {"server": round(f.server_ms, 2), "client": round(f.client_ms, 2), "right": f.right}
            for f in figures(long)
        },
    }


def _held(run: Run) -> dict[str, Any]:
    if not run.said:
        return {"held": False, "failure": run.failure}
    gap = "itl" if "itl" in run.said.figures else "itl_mean"
    off_ms = {f.name: round(f.client_ms - f.server_ms, 2) for f in figures(run)}
    judged = [abs(off_ms[f"{name}_p99"]) for name in ("ttft", gap)]
    whole = 0 < run.said.completed == sum(len(note) > 2 for note in list(run.notes.values())[-run.said.completed :])
    return {"held": whole and max(judged) < LIMIT_MS, "off_ms": off_ms, "lag_p99_ms": run.said.lag_p99_ms}


def most_streams(holds: Callable[[int], bool], start: int = 64) -> int:
    """The largest number that holds, within a quarter; 0 if not even the least does."""
    number = start
    if holds(number):
        while number < MOST and holds(2 * number):
            number *= 2
    else:
        number //= 2
        while number >= LEAST and not holds(number):
            number //= 2
        if number < LEAST:
            return 0
    low, high = number, 2 * number
    while number < MOST and high > low * _BISECT_TO:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _side_by_side(options: argparse.Namespace, bench: Bench, tools: list[Tool]) -> list[dict[str, Any]]:
    """One level after the other, all tools in turn."""
    load = Load(options.url, options.model, bench.tokenizer, bench.input_tokens, bench.chunks, 0, options.duration_s)
    levels = [load._replace(concurrency=number, requests=8 * number) for number in options.streams]
    if options.rate:
        levels.append(load._replace(rate=options.rate, requests=max(1, round(options.rate * options.duration_s))))
    rows: list[dict[str, Any]] = []
    for level in levels:
        load = level
        for tool in tools:
            run = _run(bench, tool, load)
            if tool.name == "ours" and run.said:
                load = level._replace(requests=run.said.completed)
            row = {"tool": tool.name, "concurrency": load.concurrency, "rate": load.rate, "cpu_s": round(run.cpu_s, 2)}
            rows.append(row | (run.said._asdict() if run.said else {"failure": run.failure}))
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def _table(rows: list[dict[str, Any]]) -> str:
    lines = ["tool      streams  right  CPU us/token  worst error            most streams a core"]
    for row in rows:
        for level in row["levels"]:
            if "failure" in level:
                lines.append(f"{row['tool']:9} {level['streams']:7}  failed: {level['failure'][:70]}")
                continue
            off = {name: f["client"] - f["server"] for name, f in level["figures"].items()}
            worst = max(off, key=lambda name: abs(off[name]))
            lines.append(
                f"{row['tool']:9} {level['streams']:7}  {'yes' if level['right'] else 'no':5}  "
                f"{level['cpu_us_per_token']:12.1f}  {worst:13} {off[worst]:+7.1f} ms  {row.get('most_streams', '-')}"
            )
    return "\n".join(lines) + "\n"


def _table_side_by_side(rows: list[dict[str, Any]]) -> str:
    names = ("ttft", "itl", "itl_mean", "e2e", "e2e_text")
    lines = ["tool      load   done  tokens in  out/s   " + "".join(f"{name + ' p50/p99':>18}" for name in names)]
    for row in rows:
        load = f"{row['concurrency']}" if row["concurrency"] else f"{row['rate']:g}/s"
        if "failure" in row:
            lines.append(f"{row['tool']:9} {load:6} failed: {row['failure'][:70]}")
            continue
        said = [row["figures"].get(name) for name in names]
        lines.append(
            f"{row['tool']:9} {load:6} {row['completed']:4} {row['input_tokens_per_request']:10.1f} "
            f"{row['output_tokens_per_s']:6.1f}  "
            + "".join(f"{f'{pair[0]:.1f} / {pair[1]:.1f}' if pair else '-':>18}" for pair in said)
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
