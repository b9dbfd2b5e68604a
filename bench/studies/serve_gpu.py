"""What adapters cost on a GPU: loads, tokens in flight during a load, the door, and formats of a base side by side.

    python bench/studies/serve_gpu.py --servers merged,nf4 --measure load,itl,door --out FILE
    python bench/studies/serve_gpu.py --servers merged,bf16,nf4,fp8 --measure formats --out FILE

Every server is a `tuneship serve` of its own over random weights of a real shape (`served_shapes.py`). All are started
first, then measured one after another, alone: figures of one run can be put side by side. What SGLang says that it
allocated is a difference of what was free on the card: right where servers start `--in-turn`. `--out` is written after
every measurement, so that what was measured before a failure is kept.

- load: an adapter that the server does not have, from the admin verb to "loaded", and to its answer of one token;
  one of random weights without evidence that it never saw, or those of `--sealed` in turn, each verified by its own;
- fresh: `load` of random weights, also where there are `--sealed` ones;
- itl: gaps between tokens of 16 streams while adapters are loaded and unloaded, against the rest of the same run;
- door: streams straight to the engine and through the door, in ABBA blocks (of the first server; `door_streams.py`);
- formats: closed loops of 1, 16 and 64 streams and an open one, on the base of each server with 1, 4 and 8 adapters.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import awaited
import behind_the_door
import door_streams
import httpx
import numpy as np
from served_shapes import SHAPES, write_adapter, write_base

from tuneship.bench.load import processes
from tuneship.bench.load.arrivals import Arrival, schedule
from tuneship.bench.load.metrics import summarise
from tuneship.bench.load.prompts import source
from tuneship.bench.load.workload import Request, plan
from tuneship.core import hardware
from tuneship.core.process import stop_tree, tail
from tuneship.serve import running

NF4 = ("--quantization", "nf4")
TRITON = ("--extra-arg=--lora-backend", "--extra-arg=triton")
OVERLAP = ("--extra-arg=--enable-lora-overlap-loading", "--extra-arg=--max-loaded-loras", "--extra-arg=18")
"""SGLang takes the first only with the second, of at most twice the slots; `tuneship serve` refuses both."""
UNREFUSED = (
    "import runpy; from tuneship.serve import startable as s; "
    "s.REFUSED = {k: v for k, v in s.REFUSED.items() if k not in "
    "('--max-loaded-loras', '--enable-lora-overlap-loading')}; "
    "runpy.run_module('tuneship', run_name='__main__', alter_sys=True)"
)
"""`python -c` of it is `python -m tuneship`, but for that."""
VARIANTS: dict[str, tuple[str, ...] | None] = {
    "merged": None,
    "bf16": (),
    "nf4": NF4,
    "dequantized": ("--quantization", "dequantized"),
    "fp8": ("--quantization", "fp8"),
    "bf16-triton": TRITON,
    "nf4-triton": (*NF4, *TRITON),
    "nf4-overlap": (*NF4, *OVERLAP),
    "nf4-before": NF4,
    "nf4-chunk128": (*NF4, "--extra-arg=--max-lora-chunk-size", "--extra-arg=128"),
    "nf4-eager": (*NF4, "--extra-arg=--disable-cuda-graph"),
}
"""Arguments of `tuneship serve`; None serves no adapters."""
LEFT_OUT = {"nf4-before": "segments_in_use"}
"""{server: a hook in SGLang that it does without}."""
WITHOUT = (
    "from tuneship.serve.sglang_plugin import general\n"
    "general._HOOKS = tuple(name for name in general._HOOKS if name != {hook!r})\n"
)
"""What each of its processes runs first."""
START_S, STAGGER_S = 420, 5
_ONE_CLIENT = 64
"""Streams that one process reads without being late."""
_numbers = itertools.count()


class Server(NamedTuple):
    """One that answers."""

    name: str
    url: str
    engine_url: str
    model: str
    adapters: tuple[str, ...]


class Options(NamedTuple):
    """How much of everything."""

    shape: str
    loads: int
    blocks: int
    streams: tuple[int, ...]
    open_rate: float
    clients: int
    counts: tuple[int, ...]
    window_s: float
    parts: tuple[str, ...]
    sealed: tuple[Path, ...]
    in_turn: bool
    adapters: int


def main() -> None:
    """Start, measure, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--servers", default="merged,nf4", help="of: " + ", ".join(VARIANTS))
    parser.add_argument("--measure", default="load,itl,door,formats")
    parser.add_argument("--shape", choices=SHAPES, default="1.5b")
    parser.add_argument("--work", type=Path, default=Path("served-shapes"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--loads", type=int, default=30)
    parser.add_argument("--blocks", type=int, default=10, help="ABBA blocks of each level of the door")
    parser.add_argument("--streams", type=int, nargs="*", default=(64, 256))
    parser.add_argument("--window-s", type=float, default=5, help="how long a block of the door reads")
    parser.add_argument("--parts", nargs="*", choices=door_streams.PARTS, default=door_streams.PARTS)
    parser.add_argument("--sealed", type=Path, nargs="*", default=(), help="trained adapters that fit the base")
    parser.add_argument("--in-turn", action="store_true", help="start one when the one before answers")
    parser.add_argument("--open-rate", type=float, default=20)
    parser.add_argument("--clients", type=int, default=4, help="processes of the load generator")
    parser.add_argument("--counts", type=int, nargs="*", default=(), help="adapters asked in turn, of formats")
    parser.add_argument("--adapters", type=int, default=8, help="that a server starts with; it has slots for 8")
    parser.add_argument("--serve-args", default="", help="more arguments of every `tuneship serve`")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a limit of time"))  # and the servers with it
    levels, counts = tuple(asked.streams), tuple(asked.counts)
    options = Options(
        asked.shape, asked.loads, asked.blocks, levels, asked.open_rate, asked.clients, counts, asked.window_s,
        tuple(asked.parts), tuple(asked.sealed), asked.in_turn, asked.adapters,
    )  # fmt: skip
    result = _about()
    with contextlib.ExitStack() as stack:
        servers = _start_all(
            asked.servers.split(","), asked.work, options, shlex.split(asked.serve_args), stack, result
        )
        for measure in asked.measure.split(","):
            for server in servers:
                if (measure == "door" and server.name != servers[0].name) or (
                    measure in LOADING and not server.adapters
                ):
                    continue
                began = time.monotonic()
                try:
                    figures: Any = MEASURES[measure](server, options, asked.work)
                except (OSError, RuntimeError, httpx.HTTPError, LookupError, ValueError) as error:
                    figures = {"failed": f"{type(error).__name__}: {error}"}
                result.setdefault(measure, {})[server.name] = figures
                asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
                _say(measure, server.name, f"{time.monotonic() - began:.0f} s", json.dumps(figures))


def _about() -> dict[str, Any]:
    return {
        "command": shlex.join(["python", *sys.argv]),
        "machine": hardware.detect().as_record(),
        "versions": hardware.versions(),
    }


def _say(*words: object) -> None:
    print(time.strftime("%H:%M:%S"), *words, flush=True)


def _start_all(
    names: Sequence[str], work: Path, options: Options, more: Sequence[str], stack: contextlib.ExitStack,
    result: dict[str, Any],
) -> list[Server]:  # fmt: skip
    """All servers that start; of one that does not, its last words are said."""
    base = write_base(options.shape, work / "base")
    for number in range(options.adapters):
        if not (work / "adapters" / f"a{number}").exists():
            write_adapter(options.shape, work / "adapters" / f"a{number}", seed=number)
    starting: list[tuple[str, subprocess.Popen[bytes]]] = []
    servers: list[Server | None] = []
    for name in names:
        process = _start(name, base, work, more)
        stack.callback(stop_tree, process, 20)
        if options.in_turn:
            servers.append(_answers(name, process, work, result))
        else:
            starting.append((name, process))
            time.sleep(STAGGER_S)
    servers += [_answers(name, process, work, result) for name, process in starting]
    return [server for server in servers if server]


def _start(name: str, base: Path, work: Path, more: Sequence[str]) -> subprocess.Popen[bytes]:
    folder = work / name
    folder.mkdir(exist_ok=True)
    (folder / "endpoint.json").unlink(missing_ok=True)  # of a run that was killed
    arguments = VARIANTS[name]
    program = ("-c", UNREFUSED) if arguments and set(OVERLAP) <= set(arguments) else ("-m", "tuneship")
    argv = [sys.executable, *program, "serve", str(base), "--port", "0", *more]
    argv += ["--log", str(folder / "engine.log"), "--endpoint-file", str(folder / "endpoint.json")]
    if arguments is not None:
        argv += ["--adapters", str(work / "adapters"), *arguments]
    paths = [*filter(None, [os.environ.get("PYTHONPATH")])]
    if name in LEFT_OUT:
        (folder / "sitecustomize.py").write_text(WITHOUT.format(hook=LEFT_OUT[name]), encoding="utf-8")
        paths.insert(0, str(folder.absolute()))
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    with (folder / "output").open("wb") as output:
        return subprocess.Popen(argv, stdout=output, stderr=output, env=env)


def _answers(name: str, process: subprocess.Popen[bytes], work: Path, result: dict[str, Any]) -> Server | None:
    """The server once it answers; what it allocated is put into `result`."""
    folder, began = work / name, time.monotonic()
    endpoint = awaited.endpoint(process, folder / "endpoint.json", START_S)
    if endpoint is None:
        _say("NOT STARTED", name, tail(folder / "output", 5))
        return None
    names_here = tuple(model.name for model in endpoint.models)
    engine_url = behind_the_door.engine_url(process.pid)
    memory = behind_the_door.allocated_gib(engine_url)
    result.setdefault("servers", {})[name] = {"flags": endpoint.engine.flags, "memory": memory}
    _say("READY", name, f"{time.monotonic() - began:.0f} s waited for", json.dumps(memory))
    return Server(name, endpoint.url, engine_url, names_here[0], names_here[1:])


def _load(server: Server, options: Options, work: Path) -> dict[str, Any]:
    """Adapters that nobody saw, one after the other on an idle server."""
    admin = running.find(server.url)
    spent: dict[str, list[float]] = {"loaded_ms": [], "first_answer_ms": []}
    with httpx.Client(timeout=120) as client:
        for _ in range(options.loads):
            number, path = _fresh_adapter(options, work)
            began = time.perf_counter()
            version = _verb(client, admin, "", {"path": str(path), "alias": f"new{number}"})["version"]
            loaded = time.perf_counter()
            _answer(client, server.url, f"new{number}")
            spent["loaded_ms"].append(1e3 * (loaded - began))
            spent["first_answer_ms"].append(1e3 * (time.perf_counter() - began))
            _verb(client, admin, f"/{version}/unload", {})
    return {"loads": options.loads} | {name: _quantiles(values) for name, values in spent.items()}


def _fresh(server: Server, options: Options, work: Path) -> dict[str, Any]:
    return _load(server, options._replace(sealed=()), work)


def _fresh_adapter(options: Options, work: Path) -> tuple[int, Path]:
    """A number that no other has, and where the adapter lies."""
    number = next(_numbers)
    if options.sealed:
        return number, options.sealed[number % len(options.sealed)].absolute()
    path = work / "fresh" / f"{os.getpid()}-{number}"
    return number, write_adapter(options.shape, path, seed=1000 + number)


def _verb(client: httpx.Client, admin: running.Running, path: str, body: dict[str, Any]) -> Any:
    key = {"Authorization": f"Bearer {admin.admin_key}"}
    answer = client.post(f"{admin.admin_url}/admin/adapters{path}", json=body, headers=key)
    if answer.status_code != 200:
        raise RuntimeError(answer.text[:500])
    return answer.json()


def _answer(client: httpx.Client, url: str, model: str) -> None:
    """Ask for one token, whatever it is: one that ends an answer has no text to wait for."""
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "ignore_eos": True}
    answer = client.post(f"{url}/v1/chat/completions", json=body)
    if answer.status_code != 200 or answer.json()["usage"]["completion_tokens"] != 1:
        raise RuntimeError(answer.text[:500])


def _itl(server: Server, options: Options, work: Path) -> dict[str, Any]:
    """16 streams for as long as the loads take; their gaps are sorted by whether a load was under way."""
    streams, each = 16, 200
    asked = _requests("itl", server.adapters[:4], streams * max(3, options.loads // 2), 128, each)
    admin = running.find(server.url)
    fresh = [_fresh_adapter(options, work) for _ in range(options.loads)]
    windows, zero = [], list[float]()

    def watch(now_s: float, _: object) -> None:
        zero.append(time.perf_counter() - now_s)

    with ThreadPoolExecutor(1) as pool, httpx.Client(timeout=120) as client:
        load = pool.submit(processes.run, server.url, "", asked, drain_s=120, concurrency=streams, watch=watch)
        time.sleep(2)  # the first wave is prefilled
        for number, path in fresh:
            if load.done():
                break
            start = time.perf_counter()
            version = _verb(client, admin, "", {"path": str(path), "alias": f"busy{number}"})["version"]
            windows.append((start, time.perf_counter()))
            _verb(client, admin, f"/{version}/unload", {})
            time.sleep(0.3)
        records = load.result().records
    gaps: dict[bool, list[float]] = {True: [], False: []}
    for record in records:
        for one, other in itertools.pairwise(record.chunks_s):
            touched = any(start <= zero[0] + other and zero[0] + one <= end for start, end in windows)
            gaps[touched].append(1e3 * (other - one))
    loads_ms = [1e3 * (end - start) for start, end in windows]
    return {
        "streams": streams, "loads": len(windows), "load_ms": _quantiles(loads_ms),
        "itl_ms": _quantiles(gaps[False]), "itl_during_load_ms": _quantiles(gaps[True]),
        "added_p99_ms": _p(gaps[True], 99) - _p(gaps[False], 99),
    }  # fmt: skip


def _door(server: Server, options: Options, work: Path) -> list[dict[str, Any]]:  # noqa: ARG001
    return [
        door_streams.measure(
            server.engine_url, server.url, server.model, streams=streams, blocks=options.blocks,
            clients=options.clients, window_s=options.window_s, parts=options.parts, say=_say,
        )
        for streams in options.streams
    ]  # fmt: skip


def _formats(server: Server, options: Options, work: Path) -> list[dict[str, Any]]:  # noqa: ARG001
    """512 tokens in, 128 out."""
    found = []
    counts = options.counts or ((4,) if "-" in server.name else (1, 4, 8))  # of a variation the middle will do
    for count in counts if server.adapters else (0,):
        models = server.adapters[:count] or (server.model,)
        figures: dict[str, Any] = {"adapters": count}
        _summary(server.url, _requests(f"warm {next(_numbers)}", models, 32, 512, 16), 16, options)
        for streams, waves in ((1, 3), (16, 4), (64, 3)):
            asked = _requests(f"formats {next(_numbers)}", models, streams * waves, 512, 128)
            figures[f"{streams} streams"] = _summary(server.url, asked, streams, options)
        arrivals = [Arrival(at_s) for at_s in schedule("poisson", options.open_rate, 6)]
        level = f"open {next(_numbers)}"
        prompts = source("fixed", input_tokens=512, output_tokens=128, salt=level)
        asked = plan(arrivals, prompts, level=level, models=models, input_tokens=512, output_tokens=128)
        figures[f"{options.open_rate:g}/s"] = _summary(server.url, asked, 0, options)
        found.append(figures)
        _say("formats", server.name, json.dumps(figures))
    return found


def _requests(level: str, models: Sequence[str], count: int, tokens_in: int, tokens_out: int) -> list[Request]:
    """Prompts that no cache knows, over `models` in turn."""
    prompts = source("fixed", input_tokens=tokens_in, output_tokens=tokens_out, salt=level)
    return [
        Request(0.0, models[index % len(models)], prompts.make(level, index, tokens_in), tokens_out)
        for index in range(count)
    ]


def _summary(url: str, asked: Sequence[Request], streams: int, options: Options) -> dict[str, float]:
    clients = options.clients if streams > _ONE_CLIENT else 1  # processes of their own take seconds to start
    recording = processes.run(url, "", asked, drain_s=120, processes=clients, concurrency=streams)
    result = summarise(
        recording, workload="fixed", model=asked[0].model, arrivals="closed" if streams else "poisson",
        rate=0, concurrency=streams,
    )  # fmt: skip
    if result.completed < result.requests or not (result.ttft_ms and result.tpot_ms and result.itl_ms):
        raise RuntimeError(f"{result.requests - result.completed} of {result.requests} failed: {result.errors}")
    return {
        "tokens_per_s": round(result.output_tokens_per_s, 1),
        "ttft_ms": round(result.ttft_ms.p50, 2),
        "tpot_ms": round(result.tpot_ms.p50, 3),
        "itl_p99_ms": round(result.itl_ms.p99, 2),
    }


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    return {f"p{q}": round(_p(values, q), 2) for q in (50, 95, 99)} | {"count": len(values)}


def _p(values: Sequence[float], q: float) -> float:
    return float(np.percentile(values, q))


LOADING = ("load", "fresh", "itl")
MEASURES: dict[str, Callable[[Server, Options, Path], Any]] = {
    "load": _load,
    "fresh": _fresh,
    "itl": _itl,
    "door": _door,
    "formats": _formats,
}

if __name__ == "__main__":
    main()
