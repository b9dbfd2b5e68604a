"""Does the load client measure what a server really did? Against one that notes when it sent each chunk.

A server in a process of its own (`schedule_server.py`) streams answers on a fixed schedule and notes when a request
arrived and when each chunk with text was handed to the kernel. What the client says of TTFT, ITL and E2E at p50 and p99
is then compared with the notes: each must be within 5 % or 2 ms of them, or `client_health` must call the run invalid.
Answers are steady, with a stall, in bursts, with several tokens a chunk, with empty chunks; others fail (no usage, 429,
an error in mid-stream) and must be counted by kind and not measured.

Not measured: the network between two machines, and the server's own lateness (its notes are the truth, late or not).
One stream is a closed loop of one; more are all in flight together. It exits with 1 when a level is wrong and not
called invalid. At 1,000 streams from one process the p99 TTFT was seen to be wrong by three times the lag p99: lags
at sending and at reading add up; that is why the limit on the lag is a third of the 5 % that a figure may be wrong by.

    .venv/bin/python bench/studies/truth.py --out bench/baselines/truth-2-cores.json
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from schedule_server import CHUNKS, KINDS, collect_notes, running_server

from tuneship.bench.load import metrics, processes
from tuneship.bench.load.drive import Recording
from tuneship.bench.load.workload import Request
from tuneship.core import hardware

EXPECTED = {"no-usage": "missing_usage", "http-429": "http_429", "broken": "stream_error"}
GAP_MS = {1: 10, 64: 25, 256: 50, 1000: 100}
_SENDS_PER_S = 250
"""A new connection costs the client most of a millisecond: faster than this, one core is busy with opening them."""
_SHARE = 0.05
_LEAST_MS = 2.0


class Figure(NamedTuple):
    """One percentile as the server noted it and as the client says it (ms)."""

    name: str
    server_ms: float
    client_ms: float

    @property
    def right(self) -> bool:
        """Within 5 % or 2 ms."""
        return abs(self.client_ms - self.server_ms) <= max(_LEAST_MS, _SHARE * self.server_ms)


class Verdict(NamedTuple):
    """One level: `figures` are right, or `valid` is false; and failures are counted by kind."""

    streams: int
    completed: int
    errors: dict[str, int]
    expected_errors: dict[str, int]
    chunks: int
    cpu_us_per_chunk: float
    lag_p99_ms: float
    valid: bool
    figures: list[Figure]

    @property
    def honest(self) -> bool:
        """Whether a reader is told nothing wrong."""
        right = all(figure.right for figure in self.figures)
        return self.errors == self.expected_errors and (right or not self.valid)


def main() -> None:
    """Measure every number of streams and write the verdicts as JSON."""
    parser = argparse.ArgumentParser(description="how true the load client's figures are")
    parser.add_argument("--streams", type=int, nargs="+", default=sorted(GAP_MS), choices=sorted(GAP_MS))
    parser.add_argument("--processes", type=int, default=1, help="of the client")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with running_server() as url:
        verdicts = [measure(url, streams, options.processes) for streams in options.streams]
    found = {
        "command": shlex.join([".venv/bin/python", *sys.argv]),
        "hardware": hardware.detect().as_record(),
        "versions": hardware.versions(("tuneship", "aiohttp", "uvloop", "msgspec")),
        "chunks_per_answer": CHUNKS,
        "levels": [_as_record(verdict) for verdict in verdicts],
    }
    text = json.dumps(found, indent=1) + "\n"
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    sys.exit(0 if all(verdict.honest for verdict in verdicts) else 1)


def measure(url: str, streams: int, client_processes: int = 1) -> Verdict:
    """Drive `streams` at once (one: each kind in turn) and judge what the client says by the server's notes."""
    gap_ms = GAP_MS[streams]
    _run(url, [_request(0.0, "steady", 1, -1)] * min(streams, 8), 1, 0)  # warm-up: code, and the first connections
    count = len(KINDS) if streams == 1 else streams
    requests = [
        _request(index / min(count, _SENDS_PER_S), KINDS[index % len(KINDS)], gap_ms, index) for index in range(count)
    ]
    recording = _run(url, requests, client_processes, 1 if streams == 1 else 0)
    return _judge(streams, recording, collect_notes(url))


def _run(url: str, requests: Sequence[Request], client_processes: int, concurrency: int) -> Recording:
    return processes.run(url, "", requests, drain_s=30, processes=client_processes, concurrency=concurrency)


def _request(at_s: float, kind: str, gap_ms: int, index: int) -> Request:
    """The model's name carries what the server must do and under which number it takes notes."""
    return Request(at_s, f"{kind}:{gap_ms}:{index}", [{"role": "user", "content": "truth"}], CHUNKS)


def _judge(streams: int, recording: Recording, notes: dict[str, list[float]]) -> Verdict:
    done = [record for record in recording.records if not record.error]
    theirs = [notes[record.model] for record in done]  # arrival, every chunk with text, end
    ttfts_ms = [metrics.ttft_ms(record) for record in done]
    pooled = {
        "ttft_ms": ([(note[1] - note[0]) * 1e3 for note in theirs], ttfts_ms),
        "itl_ms": (
            [(later - earlier) * 1e3 for note in theirs for earlier, later in pairwise(note[1:-1])],
            [gap for record in done for gap in metrics.itl_ms(record)],
        ),
        "e2e_ms": ([(note[-1] - note[0]) * 1e3 for note in theirs], [metrics.e2e_ms(record) for record in done]),
    }
    figures = []
    for name, (server_ms, client_ms) in pooled.items():
        server, client = metrics.percentiles(server_ms), metrics.percentiles(client_ms)
        assert server
        assert client
        figures += [Figure(f"{name}_p50", server.p50, client.p50), Figure(f"{name}_p99", server.p99, client.p99)]
    health = metrics.client_health(recording, ttfts_ms)
    chunks = sum(len(record.chunks_s) for record in recording.records)
    kinds = Counter(record.model.split(":")[0] for record in recording.records)
    return Verdict(
        streams=streams,
        completed=len(done),
        errors=dict(Counter(record.error for record in recording.records if record.error)),
        expected_errors={error: kinds[kind] for kind, error in EXPECTED.items() if kinds[kind]},
        chunks=chunks,
        cpu_us_per_chunk=recording.cpu_s / chunks * 1e6,
        lag_p99_ms=health.lag_p99_ms,
        valid=health.valid,
        figures=figures,
    )


def _as_record(verdict: Verdict) -> dict[str, Any]:
    figures = {
        f.name: {"server": round(f.server_ms, 3), "client": round(f.client_ms, 3), "right": f.right}
        for f in verdict.figures
    }
    return {**verdict._asdict(), "honest": verdict.honest, "figures": figures}


if __name__ == "__main__":
    main()
