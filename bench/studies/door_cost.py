"""What the door costs: its processor time for each chunk and each request, and what it adds to a client's latencies.

The whole of it (observe, guard, door, protocol, on uvloop) in a process of its own, before a server that answers on a
known schedule (`schedule_server.py`). The same load goes to that server itself and through the door, in turns (ABBA),
from tuneship's own load client: so the differences are the door's. Its processor time is the kernel's account of the
door's process. A door that needs 50 us a chunk is full at 20,000 chunks a second.

Not shown: what an engine on the same cores would lose to it. Here are two cores for three processes, so the latencies
under much load say more of the machine than of the door; processor time does not.

    .venv/bin/python bench/studies/door_cost.py --streams 64 --rounds 10 --out FILE
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import psutil
from schedule_server import running_server

from tuneship.bench.load import processes
from tuneship.bench.load.workload import Request
from tuneship.core import hardware

_TOKENS = 100
_STREAMS = (64, 256)


class Block(NamedTuple):
    """Medians over the requests of one block, in ms, and what the door's process computed meanwhile."""

    ttft_ms: float
    e2e_ms: float
    cpu_s: float
    chunks: int
    requests: int


def main() -> None:
    """Measure, and write the figures as JSON on stdout, and into `--out`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--streams", type=int, nargs="*", default=_STREAMS)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--door-of", default="", help=argparse.SUPPRESS)
    parser.add_argument("--fd", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.door_of:
        open_door(options.door_of, options.fd)
        return
    result = {
        "what": "tuneship's door before a server with a schedule: one chunk each 50 ms a stream; cpu is the door's",
        "command": shlex.join([".venv/bin/python", *sys.argv]),
        "hardware": hardware.detect().cpu,
        "cores": os.cpu_count(),
        "versions": {name: metadata.version(name) for name in ("uvicorn", "starlette", "aiohttp", "uvloop", "h11")},
        "levels": [measure(streams, options.rounds) for streams in options.streams],
    }
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def measure(streams: int, rounds: int) -> dict[str, float]:
    """`rounds` pairs of blocks of `streams` concurrent streams, bare and through the door."""
    with running_server() as server, running_door(server) as (door, process):
        block(server, streams, process)
        block(door, streams, process)
        pairs = []
        for number in range(rounds):
            first, second = (server, door) if number % 2 == 0 else (door, server)
            blocks = {url: block(url, streams, process) for url in (first, second)}
            pairs.append((blocks[server], blocks[door]))
    bare, through = zip(*pairs, strict=True)
    cpu_s, chunks = sum(b.cpu_s for b in through), sum(b.chunks for b in through)
    added_ttft = [t.ttft_ms - b.ttft_ms for b, t in pairs]
    slower = [t.e2e_ms / b.e2e_ms - 1 for b, t in pairs]
    return {
        "streams": streams,
        "pairs": rounds,
        "cpu_us_per_chunk_requests_included": round(1e6 * cpu_s / chunks, 1),
        "chunks_per_s": round(streams / 0.05),
        "ttft_ms_bare": round(statistics.median(b.ttft_ms for b in bare), 2),
        "ttft_ms_added_median": round(statistics.median(added_ttft), 2),
        "ttft_ms_added_max": round(max(added_ttft), 2),
        "e2e_slower_median": round(statistics.median(slower), 5),
        "e2e_slower_max": round(max(slower), 5),
    }


def block(url: str, streams: int, process: psutil.Process) -> Block:
    """All streams at once, from beginning to end."""
    asked = [Request(0.0, "steady", [{"role": "user", "content": "x" * 200}], _TOKENS) for _ in range(streams)]
    before = process.cpu_times()
    recording = processes.run(url, "", asked, drain_s=60)
    after = process.cpu_times()
    failed = [record.error for record in recording.records if record.error]
    if failed:
        raise SystemExit(f"{len(failed)} requests failed: {failed[0]}")
    records = recording.records
    return Block(
        statistics.median(1e3 * (r.chunks_s[0] - r.sent_s) for r in records),
        statistics.median(1e3 * (r.end_s - r.sent_s) for r in records),
        after.user + after.system - before.user - before.system,
        sum(len(r.chunks_s) for r in records),
        streams,
    )


@contextmanager
def running_door(server: str) -> Iterator[tuple[str, psutil.Process]]:
    """The door before `server`: its URL and process."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        descriptor = listener.fileno()
        argv = [sys.executable, __file__, "--door-of", server, "--fd", str(descriptor)]
        door = subprocess.Popen(argv, pass_fds=[descriptor])
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            listener.listen()
            time.sleep(3)
            yield url, psutil.Process(door.pid)
        finally:
            door.terminate()
            door.wait()


def open_door(server: str, descriptor: int) -> None:
    """The door's process."""
    import uvicorn  # noqa: PLC0415 - not for the process that measures
    import uvloop  # noqa: PLC0415

    from tuneship.serve.catalog import Entry  # noqa: PLC0415
    from tuneship.serve.gateway import build_door  # noqa: PLC0415
    from tuneship.serve.guard import Guard  # noqa: PLC0415
    from tuneship.serve.keys import Keyring  # noqa: PLC0415
    from tuneship.serve.metrics import Live, Metrics  # noqa: PLC0415
    from tuneship.serve.observe import Observed  # noqa: PLC0415
    from tuneship.serve.protocol import DoorProtocol  # noqa: PLC0415
    from tuneship.serve.routes import Routes  # noqa: PLC0415
    from tuneship.serve.upstream import Upstream  # noqa: PLC0415

    async def serve(keys: Path) -> None:
        base = Entry("steady", "steady@1", None, Path(), "", "")
        metrics = Metrics(Live)
        metrics.serving([base.version])
        async with Upstream(server) as upstream:
            app = Observed(Guard(build_door(Routes(base), upstream, metrics, lambda: True), Keyring(keys)), metrics)
            config = uvicorn.Config(app, http=DoorProtocol, ws="none", lifespan="off", log_config=None)
            await uvicorn.Server(config).serve(sockets=[socket.socket(fileno=descriptor)])

    with tempfile.TemporaryDirectory() as folder:
        uvloop.run(serve(Path(folder) / "keys.toml"))


if __name__ == "__main__":
    main()
