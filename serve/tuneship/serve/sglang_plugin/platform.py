"""Entry point `sglang.srt.platforms`, where SGLang asks whether it shall use our CPU platform.

Every SGLang in this environment imports this module when it starts, also those that are none of our business. So it
imports nothing at the top, and it answers None unless our launcher asked.
"""

from __future__ import annotations

import os

ENGINE_VARIABLE = "TUNESHIP_ENGINE"
"""Our launcher sets it to 1 in the engines that it starts."""
_MAIN_VARIABLE = "TUNESHIP_ENGINE_PID"
"""The engine's main process tells its workers who it is."""


def activate() -> str | None:
    """Name the platform class for an engine of ours on a machine without an accelerator; None everywhere else."""
    if os.environ.get(ENGINE_VARIABLE) != "1":
        return None
    _end_with_the_engine()
    import torch  # noqa: PLC0415 - SGLang has it loaded by now; nobody else shall pay for it

    if torch.accelerator.is_available():
        return None
    return "tuneship.serve.sglang_plugin.cpu:CpuPlatform"


def _end_with_the_engine() -> None:
    """In a worker: end when the engine's main process ends, or has ended.

    Upstream gap: SGLang's workers ask for that themselves (`kill_itself_when_parent_died`), but only after a spawned
    worker has imported everything, and without looking whether the parent is still there: an engine killed in those
    seconds leaves its detokenizer behind for ever. Mended when that function is called before the imports.
    """
    from signal import SIGKILL  # noqa: PLC0415 - see above

    main = int(os.environ.setdefault(_MAIN_VARIABLE, str(os.getpid())))
    if main == os.getpid():
        return
    from tuneship.core.process import die_with_parent  # noqa: PLC0415

    die_with_parent(SIGKILL, os.getppid())()
    try:
        os.kill(main, 0)
    except ProcessLookupError:
        os.kill(os.getpid(), SIGKILL)
