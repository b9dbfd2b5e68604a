"""How a server will fit this machine, before anything is loaded.

    facts = footprint.read(source.path)
    plan = make(facts, serve, hardware.detect(), mode="adapters", quantization="nf4", needed_tokens=8192)
    plan.kv_tokens, plan.streams(4096)

Weights, adapter slots and KV cache are SGLang's allocations to the byte (`footprint.py`). How much of a card they may
take is SGLang's own rule (0.5.17, `ServerArgs._handle_gpu_memory_settings`): it keeps a share for activations and CUDA
graphs by the card's size, and gives the rest to the KV cache. What activations really need of that share, and what CUDA
takes before anything is loaded, has not been measured on a GPU yet; `ServingPlan.remark` says so.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from tuneship.core.errors import PlanError
from tuneship.core.hardware import Hardware
from tuneship.core.recipe import Serve
from tuneship.serve import footprint, quantized
from tuneship.serve.footprint import Facts, Format
from tuneship.serve.launch import CPU_TOKENS

Mode = Literal["merged", "adapters"]

_MIB = 1 << 20
_CONTEXT_BYTES = 600 * _MIB
"""Of CUDA and its libraries on a card before SGLang loads anything; estimated."""
_CPU_RUNTIME_BYTES = 4 << 30
"""Of SGLang's processes on a CPU: 4.1 GB were measured (PSS, with a small model)."""
_CPU_USABLE = 0.9
_BY_CARD_MIB = ((20, 2048, 8), (35, 2048, 24), (60, 4096, 32), (90, 8192, 256), (160, 8192, 256))
"""(GiB of the card below which it holds, tokens of a prefill chunk, streams of the largest decode graph)."""
_LARGEST_CARD = (16384, 512)
_LARGE_CARD_MIB, _LARGE_RESERVE_MIB = 60 * 1024, 10 * 1024
_MAX_STREAMS = 2048
"""SGLang runs no more requests at once on small caches; what is over waits."""


class ServingPlan(NamedTuple):
    """A server by the terms of its memory, in bytes of its device unless said otherwise."""

    mode: Mode
    quantization: str
    device: str
    device_bytes: int
    weights_bytes: int
    slots: int
    """For adapters, the base's own with them; 0 where none can be loaded."""
    slots_bytes: int
    kv_bytes: int
    """What is left for the KV cache."""
    kv_tokens: int
    reserve_bytes: int
    """What SGLang leaves for activations and CUDA graphs."""
    runtime_bytes: int
    """Of the runtime before anything is loaded."""
    adapter_host_bytes: int
    """Of one loaded adapter of the largest rank, in the machine's memory."""
    needed_tokens: int
    context_length: int
    remark: str
    """How far the figures can be trusted."""

    @property
    def fits(self) -> bool:
        """Whether the KV cache is a usable one."""
        return self.kv_tokens >= self.needed_tokens

    def streams(self, length: int) -> int:
        """How many requests of `length` tokens, prompt and answer, run at once."""
        return min(self.kv_tokens // length, _MAX_STREAMS)


def make(
    facts: Facts,
    serve: Serve,
    machine: Hardware,
    *,
    mode: Mode,
    quantization: Format,
    needed_tokens: int,
    double: bool = True,
) -> ServingPlan:
    """Lay out a server's memory. `double` is that of an NF4 base which is still to be written.

    Raises:
        PlanError: over several GPUs.

    """
    if quantized.tensor_parallel(serve.extra_args) != "1":
        raise PlanError("the memory of a server over several GPUs cannot be planned", hint="name serve.mode")
    width = 4 if serve.dtype == "float32" else 2
    slots = serve.max_loras + 1 if mode == "adapters" else 0
    weights = footprint.weights_bytes(facts, quantization, width, double=double)
    slots_bytes = slots * footprint.slot_bytes(facts.shape, serve.max_rank, width)
    room = _card(serve, machine) if machine.gpus else _cpu(machine)
    left = max(room.static_bytes - weights - slots_bytes, 0)
    tokens = left // footprint.kv_bytes_per_token(facts.shape, width)
    if not machine.gpus:
        tokens = min(tokens, CPU_TOKENS)
    return ServingPlan(
        mode=mode,
        quantization=facts.stored if facts.stored != "none" else quantization,
        device=machine.gpus[0].name if machine.gpus else "CPU",
        device_bytes=room.device_bytes,
        weights_bytes=weights,
        slots=slots,
        slots_bytes=slots_bytes,
        kv_bytes=tokens * footprint.kv_bytes_per_token(facts.shape, width),
        kv_tokens=tokens,
        reserve_bytes=room.reserve_bytes,
        runtime_bytes=room.runtime_bytes,
        adapter_host_bytes=footprint.adapter_host_bytes(facts.shape, serve.max_rank) if slots else 0,
        needed_tokens=needed_tokens if machine.gpus else min(needed_tokens, CPU_TOKENS),
        context_length=serve.context_length or facts.context_length,
        remark=room.remark,
    )


def memory_fraction(card_mib: float) -> float:
    """The share of a card that SGLang 0.5.17 gives to weights, slots and KV cache unless it is told one."""
    chunk, streams = next((rest for gib, *rest in _BY_CARD_MIB if card_mib < gib * 1024), _LARGEST_CARD)
    reserve = 512 + 1.5 * chunk + 1024 / 8 + 2 * streams + 8 * _prefill_graphs(chunk)
    if card_mib > _LARGE_CARD_MIB:
        reserve = max(reserve, _LARGE_RESERVE_MIB)
    return round((card_mib - reserve) / card_mib, 3)


class _Room(NamedTuple):
    """What a device has; `static_bytes` are for weights, slots and KV cache together."""

    device_bytes: int
    static_bytes: int
    reserve_bytes: int
    runtime_bytes: int
    remark: str


def _card(serve: Serve, machine: Hardware) -> _Room:
    total = min(gpu.memory_bytes for gpu in machine.gpus)
    share = memory_fraction(total / _MIB) if serve.memory_fraction == "auto" else serve.memory_fraction
    free = total - _CONTEXT_BYTES
    static = int(free * share)
    remark = "reserve and runtime are estimated: SGLang's own rule, not measured on a GPU yet"
    return _Room(total, static, free - static, _CONTEXT_BYTES, remark)


def _cpu(machine: Hardware) -> _Room:
    usable = int(machine.memory_bytes * _CPU_USABLE)
    reserve = machine.memory_bytes - usable
    remark = f"on a CPU the KV cache has {CPU_TOKENS:,} tokens at most"
    return _Room(machine.memory_bytes, usable - _CPU_RUNTIME_BYTES, reserve, _CPU_RUNTIME_BYTES, remark)


def _prefill_graphs(chunk: int) -> int:
    """How many sizes SGLang captures for prefill (`_generate_prefill_cuda_graph_batch_sizes`)."""
    steps = ((4, 33, 4), (48, 257, 16), (288, 513, 32), (576, 1025, 64), (1280, 4097, 256), (4608, chunk + 1, 512))
    return sum(size <= chunk for first, last, step in steps for size in range(first, last, step))
