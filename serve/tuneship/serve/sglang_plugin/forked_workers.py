"""The scheduler and the detokenizer as forks of the engine's main process.

Upstream gap: none; SGLang starts its workers with `spawn`, which CUDA requires. On a CPU each worker then imports all
libraries anew, which is half of the start and half of the memory. A fork shares both. It is only done while the main
process has a single thread: a lock held by another thread would stay locked in the child for ever.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
from pathlib import Path
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

HOOKED = "sglang.srt.entrypoints.engine._set_envs_and_config"
"""It ends with `set_start_method("spawn", force=True)`, just before the workers are started."""

_HARMLESS = {"jemalloc_bg_thd"}
"""pyarrow's allocator, which takes its locks around a fork (`pthread_atfork`)."""

logger = logging.getLogger(__name__)


def install() -> None:
    """Fork after SGLang has chosen to spawn."""
    HookRegistry.register(HOOKED, choose_fork, HookType.AFTER)
    HookRegistry.apply_hooks()


def choose_fork(_result: Any, *_args: Any, **_kwargs: Any) -> None:
    """Start workers by fork from now on, if no thread of ours could hold a lock that matters."""
    unknown = _thread_names() - _HARMLESS
    if unknown:
        logger.info("workers are spawned, not forked: the main process runs other threads: %s", sorted(unknown))
    else:
        multiprocessing.set_start_method("fork", force=True)


def _thread_names() -> set[str]:
    """What the kernel calls the threads beside the main one."""
    main = str(os.getpid())
    return {(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir() if task.name != main}
