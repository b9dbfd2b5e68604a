"""`tuneship doctor`: is this machine fit to train and to serve? Each line says fine, or what to do."""

from __future__ import annotations

import json
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil
from rich.markup import escape
from rich.table import Table

from tuneship.cli.console import out
from tuneship.core import hardware
from tuneship.core.cache import cache_dir
from tuneship.core.errors import TuneshipError
from tuneship.core.hardware import Hardware, gib

GIB = 2**30
_PYTHON = ((3, 11), (3, 13))
SERVES_FROM = (8, 0)
"""Compute capability that SGLang's kernels start at; below it a card can train and not serve."""
_BF16_FROM = (8, 0)
_MEMORY_BYTES = 8 * GIB
_DISK_BYTES = 20 * GIB
_PROBE_S = 180

# Runs in a process of its own: the command line imports no torch. Prints one JSON object.
_PROBE = """
import json, warnings
warnings.simplefilter("ignore")
found = {}
def look(name, function):
    try:
        found[name] = function()
    except Exception as error:
        found[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
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
print(json.dumps(found))
"""

Verdict = Literal["fine", "limited", "broken"]


class Finding(NamedTuple):
    """One line: what was looked at, how it is, and what to do unless it is fine."""

    what: str
    verdict: Verdict
    detail: str
    advice: str = ""


class Facts(NamedTuple):
    """What the findings are made of."""

    python: tuple[int, int]
    machine: Hardware
    libraries: Mapping[str, Mapping[str, Any]]
    """{library: {"version": ..., ...} or {"error": ...}}, as the probe prints it."""
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
    findings = list(judge(look(port)))
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    styles = {"fine": "green", "limited": "yellow", "broken": "bold red"}
    for finding in findings:
        detail = escape(finding.detail) + (f"\n[cyan]do[/]: {escape(finding.advice)}" if finding.advice else "")
        table.add_row(finding.what, f"[{styles[finding.verdict]}]{finding.verdict}[/]", detail)
    out.print(table)
    broken = [finding.what for finding in findings if finding.verdict == "broken"]
    if broken:
        raise TuneshipError(f"not fit yet: {', '.join(broken)}", hint="each line above says what to do")


def look(port: int) -> Facts:
    """Gather the facts; takes as long as importing torch does."""
    return Facts(
        python=(sys.version_info.major, sys.version_info.minor),
        machine=hardware.detect(),
        libraries=_probe(),
        memory_free_bytes=psutil.virtual_memory().available,
        disk_free_bytes={str(path): shutil.disk_usage(path).free for path in (Path.cwd(), cache_dir())},
        port=port,
        port_is_free=_is_free(port),
    )


def judge(facts: Facts) -> Iterator[Finding]:
    """Say what the facts mean; needs no machine."""
    yield _python(facts.python)
    yield _torch(facts)
    yield from _gpus(facts.machine)
    yield _bitsandbytes(facts.libraries.get("bitsandbytes", {}))
    yield _sglang(facts.libraries.get("sglang", {}))
    yield _memory(facts.memory_free_bytes)
    yield from (_disk(path, free) for path, free in facts.disk_free_bytes.items())
    yield _port(facts.port, facts.port_is_free)


def _python(version: tuple[int, int]) -> Finding:
    least, below = _PYTHON
    text = f"{platform.python_implementation()} {version[0]}.{version[1]}"
    if least <= version < below:
        return Finding("Python", "fine", text)
    return Finding("Python", "broken", text, f"use Python {least[0]}.{least[1]} or {below[0]}.{below[1] - 1}")


def _torch(facts: Facts) -> Finding:
    torch = facts.libraries.get("torch", {})
    if "version" not in torch:
        return _missing("torch", torch, "train")
    cuda = f", built for CUDA {torch['cuda']}" if torch["cuda"] else ", built without CUDA"
    detail = f"{torch['version']}{cuda}"
    if facts.machine.gpus and not torch["sees_gpu"]:
        advice = f"install a torch that driver {facts.machine.driver} can run, or update the driver"
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


def _probe() -> dict[str, dict[str, Any]]:
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=_PROBE_S, check=False
        )
        found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, json.JSONDecodeError, IndexError):
        error = {"error": "importing the libraries crashed or hung"}
        return dict.fromkeys(("torch", "bitsandbytes", "sglang"), error)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
