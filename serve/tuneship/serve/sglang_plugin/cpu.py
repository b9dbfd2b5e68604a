"""SGLang on a CPU with nothing but what PyPI's wheel has: an out-of-tree platform.

Upstream gap: SGLang's own CPU engine (`SGLANG_USE_CPU_ENGINE=1`) needs kernels of its `sgl-kernel-cpu` build, which no
wheel carries. We call ourselves out-of-tree and pick the pure torch backends everywhere. When a stock
`python -m sglang.launch_server --device cpu` answers in an environment without this plugin, the gap is mended and this
module goes.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.interface import PlatformEnum, SRTPlatform

from tuneship.serve.sglang_plugin import forked_workers, four_bit_on_cpu, grammar_on_cpu, pinned_memory


class CpuPlatform(CpuDeviceMixin, SRTPlatform):  # type: ignore[misc]
    """A CPU that SGLang treats as a vendor's device. Every capability stays False, as in the base class."""

    _enum = PlatformEnum.OOT

    def get_device(self, local_rank: int = 0) -> str:
        """Name the device as a string: the mixin's `torch.device` breaks the server arguments' checks."""
        del local_rank
        return "cpu"

    def get_default_attention_backend(self) -> str:
        """Choose attention in plain torch: the others are CUDA, Triton or the missing CPU kernels."""
        return "torch_native"

    def get_compile_backend(self, mode: str | None = None) -> str:
        """Compile nothing: inductor stalls for 17 s and wins nothing at these sizes."""
        del mode
        return "eager"

    def get_mha_kv_pool_cls(self) -> type:
        """Name the stock KV pool; 0.5.17 asks every out-of-tree platform, 0.5.23 has a default."""
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool  # noqa: PLC0415 - it imports this platform

        return MHATokenToKVPool  # type: ignore[no-any-return]

    def get_paged_allocator_cls(self) -> type:
        """Name the stock allocator; 0.5.17 asks every out-of-tree platform, 0.5.23 has a default."""
        from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator  # noqa: PLC0415 - as above

        return PagedTokenToKVPoolAllocator  # type: ignore[no-any-return]

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Set what has no flag of ours: LoRA in plain torch, and a scheduler that sleeps when it has nothing to do.

        Without `sleep_on_idle` an idle engine burns one core, which on a small machine is half of it.
        """
        server_args.lora_backend = "torch_native"
        server_args.sleep_on_idle = True
        forked_workers.install()

    def init_backend(self) -> None:
        """Hang in our hooks, once in each worker."""
        pinned_memory.install()
        four_bit_on_cpu.install()
        grammar_on_cpu.install()
