"""`tuneship doctor`: is this machine fit to train and to serve? Each line says fine, or what to do.

A line is printed as soon as it is known: importing the libraries takes seconds, so they come last.
"""

from __future__ import annotations

import json
import platform
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import psutil
from rich.markup import escape
from rich.table import Table

from tuneship.cli.console import out
from tuneship.core import hardware
from tuneship.core.cache import cache_dir
from tuneship.core.errors import TuneshipError
from tuneship.core.hardware import SERVES_FROM, Hardware, gib
from tuneship.core.process import spawn, stop_tree
from tuneship.core.progress import say

GIB = 2**30
_PYTHON = ((3, 11), (3, 13))
_BF16_FROM = (8, 0)
_MEMORY_BYTES = 8 * GIB
_DISK_BYTES = 20 * GIB
_PROBE_S = 180

# Runs in a process of its own: the command line imports no torch. Prints a line of JSON for each library.
_PROBE = """
import json, warnings
warnings.simplefilter("ignore")
def look(name, function):
    try:
        found = function()
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    print(json.dumps([name, found]), flush=True)
def torch_():
    import torch
    return {"version": torch.__version__, "cuda": torch.version.cuda or "", "sees_gpu": torch.cuda.is_available()}
def bitsandbytes_():
    import bitsandbytes as bnb, torch
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = torch.randn(64, 64, dtype=torch.bfloat16, device=device)
    packed, state = bnb.functional.quantize_4bit(weights, quant_type="nf4", compress_statistics=True)
    back = bnb.functional.dequantize_4bit(packed, state)
    assert (back - weights).abs().mean() < 0.2
    return {"version": bnb.__version__, "device": device}
def sglang_():
    from importlib.metadata import entry_points, version
    import sglang
    names = [point.name for point in entry_points(group="sglang.srt.platforms")]
    return {"version": version("sglang"), "plugin": "tuneship_cpu" in names}
look("torch", torch_); look("bitsandbytes", bitsandbytes_); look("sglang", sglang_)
"""

Verdict = Literal["fine", "limited", "broken"]


class Finding(NamedTuple):
    """One line: what was looked at, how it is, and what to do unless it is fine."""

    what: str
    verdict: Verdict
    detail: str
    advice: str = ""


class Libraries(Protocol):
    """{library: {"version": ..., ...} or {"error": ...}}, as the probe prints it; asking for one may take seconds."""

    def __getitem__(self, name: str, /) -> Mapping[str, Any]:
        """What the probe found of it."""


class Facts(NamedTuple):
    """What the findings are made of."""

    python: tuple[int, int]
    machine: Hardware
    libraries: Libraries
    memory_free_bytes: int
    disk_free_bytes: Mapping[str, int]
    port: int
    port_is_free: bool


def doctor(*, port: int = 30000) -> None:
    """Look at this machine and say of each part whether it is fine, or what to do.

    Parameters
    ----------
    port
        The port that the server shall listen on.

    """
    broken = []
    with _probe() as libraries:
        for finding in judge(look(port, libraries)):
            _show(finding)
            if finding.verdict == "broken":
                broken.append(finding.what)
    if broken:
        raise TuneshipError(f"not fit yet: {', '.join(broken)}", hint="each line above says what to do")


def look(port: int, libraries: Libraries) -> Facts:
    """Gather the facts."""
    return Facts(
        python=(sys.version_info.major, sys.version_info.minor),
        machine=hardware.detect(),
        libraries=libraries,
        memory_free_bytes=psutil.virtual_memory().available,
        disk_free_bytes={str(path): shutil.disk_usage(path).free for path in (Path.cwd(), cache_dir())},
        port=port,
        port_is_free=_is_free(port),
    )


def judge(facts: Facts) -> Iterator[Finding]:
    """Say what the facts mean, what is known at once before the libraries; needs no machine."""
    yield _python(facts.python)
    yield from _gpus(facts.machine)
    yield _memory(facts.memory_free_bytes)
    yield from (_disk(path, free) for path, free in facts.disk_free_bytes.items())
    yield _port(facts.port, facts.port_is_free)
    yield _torch(facts.libraries["torch"], facts.machine)
    yield _bitsandbytes(facts.libraries["bitsandbytes"])
    yield _sglang(facts.libraries["sglang"])


def _show(finding: Finding) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim", width=len("bitsandbytes"))
    table.add_column(width=len("limited"))
    table.add_column(overflow="fold")
    styles = {"fine": "green", "limited": "yellow", "broken": "bold red"}
    detail = escape(finding.detail) + (f"\n[cyan]do[/]: {escape(finding.advice)}" if finding.advice else "")
    table.add_row(finding.what, f"[{styles[finding.verdict]}]{finding.verdict}[/]", detail)
    out.print(table)


def _python(version: tuple[int, int]) -> Finding:
    least, below = _PYTHON
    text = f"{platform.python_implementation()} {version[0]}.{version[1]}"
    if least <= version < below:
        return Finding("Python", "fine", text)
    return Finding("Python", "broken", text, f"use Python {least[0]}.{least[1]} or {below[0]}.{below[1] - 1}")


def _torch(torch: Mapping[str, Any], machine: Hardware) -> Finding:
    if "version" not in torch:
        return _missing("torch", torch, "train")
    cuda = f", built for CUDA {torch['cuda']}" if torch["cuda"] else ", built without CUDA"
    detail = f"{torch['version']}{cuda}"
    if machine.gpus and not torch["sees_gpu"]:
        advice = f"install a torch that driver {machine.driver} can run, or update the driver"
        return Finding("torch", "broken", f"{detail}; it does not see the GPU", advice)
    return Finding("torch", "fine", detail)


def _gpus(machine: Hardware) -> Iterator[Finding]:
    if not machine.gpus:
        advice = "nothing, for the quickstart and small models; larger ones want a GPU with a driver (nvidia-smi)"
        yield Finding("GPU", "limited", f"none: everything runs on {machine.cores} CPU cores, slowly", advice)
    for gpu in machine.gpus:
        major, minor = gpu.capability
        detail = f"{gpu.name}, {gib(gpu.memory_bytes, 0)}, compute capability {major}.{minor}"
        if gpu.capability >= SERVES_FROM:
            yield Finding("GPU", "fine", detail)
            continue
        lacks = "no bf16; " if gpu.capability < _BF16_FROM else ""
        advice = "train here, serve on a card of compute capability 8.0 or newer (Ampere: A10, RTX 30)"
        yield Finding("GPU", "limited", f"{detail}: {lacks}it can train, not serve", advice)


def _bitsandbytes(found: Mapping[str, Any]) -> Finding:
    if "version" not in found:
        return _missing("bitsandbytes", found, "train")
    return Finding("bitsandbytes", "fine", f"{found['version']}, quantizes to NF4 on {found['device']}")


def _sglang(found: Mapping[str, Any]) -> Finding:
    if "version" not in found:
        return _missing("SGLang", found, "serve")
    if not found["plugin"]:
        advice = "install tuneship itself (uv pip install --no-deps -e .), not only its folder on the path"
        return Finding("SGLang", "broken", f"{found['version']}; it cannot see our plugin", advice)
    return Finding("SGLang", "fine", f"{found['version']}, with our plugin")


def _memory(free: int) -> Finding:
    detail = f"{gib(free)} free"
    if free >= _MEMORY_BYTES:
        return Finding("memory", "fine", detail)
    return Finding("memory", "limited", detail, f"the quickstart needs {gib(_MEMORY_BYTES, 0)}: end something")


def _disk(path: str, free: int) -> Finding:
    detail = f"{gib(free, 0)} free at {path}"
    if free >= _DISK_BYTES:
        return Finding("disk", "fine", detail)
    advice = "a merged 7B checkpoint takes 15 GiB: free some, or set TUNESHIP_CACHE and --run to another disk"
    return Finding("disk", "limited", detail, advice)


def _port(port: int, free: bool) -> Finding:
    if free:
        return Finding("port", "fine", f"{port} is free")
    return Finding("port", "limited", f"{port} is in use", "set serve.port to another one, or 0 for any")


def _missing(what: str, found: Mapping[str, Any], extra: str) -> Finding:
    reason = str(found.get("error", "it was not found"))
    return Finding(what, "broken", reason, f"pip install 'tuneship[{extra}]'")


@contextmanager
def _probe() -> Iterator[Libraries]:
    """What the probe finds, while it runs."""
    process = spawn([sys.executable, "-c", _PROBE], stdout=subprocess.PIPE)
    end = threading.Timer(_PROBE_S, process.kill)
    end.start()
    try:
        yield _Probed(process)
    finally:
        end.cancel()
        stop_tree(process, grace_s=0)
        assert process.stdout
        process.stdout.close()


class _Probed:
    """The lines of a probe, read as far as they are asked for."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout
        self._lines = process.stdout
        self._found: dict[str, Mapping[str, Any]] = {}
        self._waiting = False

    def __getitem__(self, name: str, /) -> Mapping[str, Any]:
        if not self._waiting:
            self._waiting = True
            say("importing torch, bitsandbytes and SGLang")
        while name not in self._found:
            line = self._lines.readline()
            if not line:
                return {"error": "importing the libraries crashed or hung"}
            if line.startswith(b'["'):  # else it is what a library says while it is imported
                library, found = json.loads(line)
                self._found[library] = found
        return self._found[name]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
