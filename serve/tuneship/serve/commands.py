"""`tuneship serve`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal


def serve(
    model: str,
    *,
    adapters: Path | None = None,
    name: str = "",
    host: str = "127.0.0.1",
    port: int = 30000,
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    quantization: Literal["none", "nf4", "fp8", "w4a16"] = "none",
    max_loras: int = 8,
    max_rank: int = 64,
    context_length: int = 0,
    memory_fraction: Literal["auto"] | float = "auto",
    extra_arg: list[str] | None = None,
    endpoint_file: Path | None = None,
    log: Path | None = None,
) -> None:
    """Serve a merged checkpoint, or any number of adapters on one base, until Ctrl-C.

    An NF4 base (of `tuneship base build`) is served as such without being asked.

    Parameters
    ----------
    model
        A merged artifact's or an NF4 base's directory, or a base: hub id, local path, bundled:smollm2-135m-instruct.
    adapters
        An adapter, or a directory of them, served beside the base, each under its own name.
    name
        What clients call MODEL.
    host
        Address of the door. There are no API keys yet: stay on loopback.
    port
        Port of the door; 0 takes a free one.
    dtype
        Of weights and activations; auto is bfloat16 where the hardware has it.
    quantization
        Of the base. nf4: the 4-bit base that adapters are trained on, written when it is not there yet. fp8: SGLang
        quantizes while it loads, on a GPU. w4a16 is not yet supported.
    max_loras
        Adapters in one batch; more than that take turns.
    max_rank
        Largest rank of an adapter.
    context_length
        Longest prompt and answer together, in tokens; 0 is the model's own.
    memory_fraction
        Share of GPU memory for weights and KV cache.
    extra_arg
        Handed to SGLang as it is; once for each word.
    endpoint_file
        Describe the running server here; removed at its end.
    log
        The engine's log.

    """
    from pydantic import ValidationError  # noqa: PLC0415 - `--help` starts without all of this

    from tuneship.core.cache import cache_dir  # noqa: PLC0415
    from tuneship.core.errors import RecipeError  # noqa: PLC0415
    from tuneship.core.recipe import Serve  # noqa: PLC0415
    from tuneship.serve import catalog, quantized, server  # noqa: PLC0415

    try:
        settings = Serve(
            mode="adapters" if adapters else "merged",
            dtype=dtype,
            quantization=quantization,
            host=host,
            port=port,
            max_loras=max_loras,
            max_rank=max_rank,
            context_length=context_length,
            memory_fraction=memory_fraction,
            extra_args=tuple(extra_arg or ()),
        )
    except ValidationError as error:
        first = error.errors()[0]
        flag = f"--{str(first['loc'][0]).replace('_', '-')}: " if first["loc"] else ""
        raise RecipeError(f"{flag}{first['msg'].removeprefix('Value error, ')}") from None
    served = quantized.with_quantization(model, settings)
    name = name or quantized.public_name(model)
    found = catalog.read(served, adapters, max_rank=max_rank, name=name)
    log = log or cache_dir() / "logs" / f"serve-{port or os.getpid()}.log"
    server.run(found, settings, server.Files(log, endpoint_file))
