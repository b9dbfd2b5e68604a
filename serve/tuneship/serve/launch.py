"""From what is wanted to SGLang's command line, by pure functions.

    config = configure(recipe.serve, catalog, hardware.detect(), port=31000)
    flags(config)  # ["--model-path", "/models/base", "--host", "127.0.0.1", ...]

Flags, not SGLang's Python API: they are what SGLang documents, what a log shows, and what a user can repeat by hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tuneship.core import checkpoint
from tuneship.core.cache import cache_dir
from tuneship.core.hardware import Hardware
from tuneship.core.recipe import Serve
from tuneship.serve import quantized, tools
from tuneship.serve.catalog import Catalog
from tuneship.serve.preflight import PROJECTIONS
from tuneship.serve.sglang_plugin.platform import ENGINE_VARIABLE

LOOPBACK = "127.0.0.1"

# On a CPU SGLang would take most of the RAM for its KV cache, and 16 streams are past the machine's knee.
CPU_TOKENS = 20_000
_CPU_REQUESTS = 16

_QUANTIZATION_FLAGS: Mapping[quantized.Method, tuple[str, ...]] = {
    "none": (),
    "nf4": ("--quantization", "bitsandbytes", "--load-format", "bitsandbytes"),
    "fp8": ("--quantization", "fp8"),
}


@dataclass(frozen=True)
class LoraLimits:
    """What is fixed at launch for all adapters. `max_loras` counts adapters, not the base."""

    max_loras: int
    max_rank: int
    target_modules: tuple[str, ...] = PROJECTIONS


class LoadedAdapter(NamedTuple):
    """An adapter that the engine starts with, under the name that it has there alone."""

    selector: str
    path: Path
    pinned: bool = False


@dataclass(frozen=True)
class EngineConfig:
    """One SGLang server. `lora` is None where no adapter can be loaded."""

    model_path: Path
    served_name: str
    port: int
    dtype: str
    cpu: bool
    host: str = LOOPBACK
    context_length: int = 0
    memory_fraction: float | None = None
    quantization: quantized.Method = "none"
    lora: LoraLimits | None = None
    adapters: tuple[LoadedAdapter, ...] = ()
    tool_parser: str = ""
    extra_args: tuple[str, ...] = ()


def configure(
    serve: Serve, catalog: Catalog, hardware: Hardware, port: int, adapters: Sequence[LoadedAdapter] = ()
) -> EngineConfig:
    """Choose the engine's settings for this catalog on this machine, to start with `adapters`; it listens on loopback.

    Raises:
        PreflightError: SGLang cannot serve a base of this quantization so.

    """
    return EngineConfig(
        model_path=catalog.model_path,
        served_name=catalog.base.name,
        port=port,
        dtype=pick_dtype(serve.dtype),
        cpu=not hardware.gpus,
        context_length=serve.context_length,
        memory_fraction=None if serve.memory_fraction == "auto" else serve.memory_fraction,
        quantization=quantized.method(serve, catalog.weights, hardware),
        lora=LoraLimits(serve.max_loras, serve.max_rank) if catalog.mode == "adapters" else None,
        adapters=tuple(adapters),
        tool_parser=tools.parser(checkpoint.chat_template(catalog.model_path)),
        extra_args=serve.extra_args,
    )


def pick_dtype(wanted: str) -> str:
    """What an engine computes in, and casts 16- and 32-bit weights to; every card that serves has bf16."""
    return "bfloat16" if wanted == "auto" else wanted


def flags(config: EngineConfig) -> list[str]:
    """SGLang's arguments for `config`. `extra_args` come last: for a flag given twice SGLang takes the last."""
    return [
        *("--model-path", str(config.model_path)),
        *("--served-model-name", config.served_name),
        *("--host", config.host),
        *("--port", str(config.port)),
        *("--dtype", config.dtype),
        # Our readiness check is the warm-up: one generated token from every model that is served.
        "--skip-server-warmup",
        "--enable-metrics",
        # Without one a model's tool calls come back as plain text.
        *(("--tool-call-parser", config.tool_parser) if config.tool_parser else ()),
        *(("--context-length", str(config.context_length)) if config.context_length else ()),
        *(("--mem-fraction-static", str(config.memory_fraction)) if config.memory_fraction else ()),
        *_QUANTIZATION_FLAGS[config.quantization],
        *(_cpu_flags() if config.cpu else ()),
        *(_lora_flags(config.lora, config.adapters) if config.lora else ()),
        *config.extra_args,
    ]


def environment(config: EngineConfig, ours: Mapping[str, str], counters: Path) -> dict[str, str]:
    """Variables for the engine's process on top of `ours`, its parent's; its processes count in `counters`."""
    added = {
        ENGINE_VARIABLE: "1",
        # SGLang takes a folder of its own under /tmp and leaves it there when it is killed; one that it inherits it
        # shares with whoever counts there too.
        "PROMETHEUS_MULTIPROC_DIR": str(counters),
        # All that it loads lies on this disk: a look-up on the hub could only hang or surprise.
        "HF_HUB_OFFLINE": ours.get("HF_HUB_OFFLINE", "1"),
    }
    if ours.get("PYTHONDONTWRITEBYTECODE"):
        # Starting imports thousands of modules: 30 s from bytecode, 100 s without. Where none may be written beside
        # the sources (many container images say so), it goes to our cache.
        added |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(cache_dir() / "bytecode")}
    if ours.get("SGLANG_GRPC_PORT"):
        added["SGLANG_GRPC_PORT"] = ""  # it would listen there too, and ask nobody for a key
    if config.cpu:
        # Its workers are forked only while there are no other threads (sglang_plugin/forked_workers.py).
        added["OPENBLAS_NUM_THREADS"] = "1"
    return added


def _cpu_flags() -> tuple[str, ...]:
    return ("--max-total-tokens", str(CPU_TOKENS), "--max-running-requests", str(_CPU_REQUESTS))


def _lora_flags(limits: LoraLimits, adapters: tuple[LoadedAdapter, ...]) -> tuple[str, ...]:
    return (
        "--enable-lora",
        *("--max-loras-per-batch", str(limits.max_loras + 1)),  # SGLang counts the base as one
        *("--max-lora-rank", str(limits.max_rank)),
        # By name: `all` would wrap the embeddings too.
        *("--lora-target-modules", *limits.target_modules),
        *(("--lora-paths", *map(_lora_path, adapters)) if adapters else ()),
    )


def _lora_path(adapter: LoadedAdapter) -> str:
    if adapter.pinned:
        return json.dumps({"lora_name": adapter.selector, "lora_path": str(adapter.path), "pinned": True})
    return f"{adapter.selector}={adapter.path}"
