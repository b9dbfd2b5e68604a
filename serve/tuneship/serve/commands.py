"""`tuneship serve`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal


def serve(
    model: str,
    *,
    adapters: list[Path] | None = None,
    name: str = "",
    host: str = "127.0.0.1",
    port: int = 30000,
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    quantization: Literal["none", "nf4", "dequantized", "fp8", "w4a16"] = "none",
    template: str = "",
    max_loras: int = 8,
    max_rank: int = 64,
    context_length: int = 0,
    memory_fraction: Literal["auto"] | float = "auto",
    verify: bool = True,
    restarts: int = 5,
    hang_timeout: float = 60,
    drain: float = 30,
    extra_arg: list[str] | None = None,
    keys: Path | None = None,
    state: Path | None = None,
    admin_port: int = 0,
    endpoint_file: Path | None = None,
    log: Path | None = None,
) -> None:
    """Serve a merged checkpoint, or any number of adapters on one base, until Ctrl-C.

    A base of `tuneship base build` is served as such without being asked.

    Parameters
    ----------
    model
        A merged artifact's directory, or its run's; a built base's; or a base: hub id, local path,
        bundled:smollm2-135m-instruct.
    adapters
        An adapter, a directory of them, or a run (the adapter that it trained last), served beside the base, each under
        its own name; once for each.
    name
        What clients call MODEL.
    host
        Address of the door. Beyond loopback it needs an API key (`tuneship keys add`).
    port
        Port of the door; 0 takes a free one.
    dtype
        Of weights and activations; auto is bfloat16 where the hardware has it.
    quantization
        Of the base. nf4: the 4-bit base that adapters are trained on, written when it is not there yet. dequantized:
        the values of that in 16 bits, for their memory at their speed, written likewise. fp8: SGLang quantizes while
        it loads, on a GPU. A W4A16 checkpoint (compressed-tensors) is served as it is.
    template
        Chat template of a base, in place of its own: alpaca, chatml, mistral, or a Jinja file such as the
        chat_template.jinja that lies in an adapter. A merged model has its own.
    max_loras
        Adapters in one batch; more than that take turns.
    max_rank
        Largest rank of an adapter.
    context_length
        Longest prompt and answer together, in tokens; 0 is the model's own.
    memory_fraction
        Share of GPU memory for weights and KV cache.
    verify
        Hold an adapter against what its training measured before it answers anybody.
    restarts
        Of an engine that died or hangs, in a row, before the server ends.
    hang_timeout
        Seconds without anything from the engine, while requests wait, after which it is asked; it is restarted when it
        does not answer that within as many more, 20 at most.
    drain
        Seconds that what is in flight may take when the server is told to end.
    extra_arg
        Handed to SGLang as it is, once for each word; what would undo a promise of the door is refused by name.
    keys
        The file of API keys; by default $TUNESHIP_KEYS or ~/.config/tuneship/keys.toml.
    state
        Directory of the registry: which versions there are, and which answer. A server that is started again with it
        comes back as it was. Default: one for this base and port; with --port 0 nothing is kept. With it, --adapters
        may be left out.
    admin_port
        Of the admin side, on loopback; 0 takes a free one, which `tuneship adapters` finds.
    endpoint_file
        Describe the running server here; removed at its end.
    log
        The engine's log.

    """
    from pydantic import ValidationError  # noqa: PLC0415 - `--help` starts without all of this

    from tuneship.core import chat_templates, rundir  # noqa: PLC0415
    from tuneship.core.cache import cache_dir, keys_file, state_dir  # noqa: PLC0415
    from tuneship.core.errors import RecipeError  # noqa: PLC0415
    from tuneship.core.recipe import Serve  # noqa: PLC0415
    from tuneship.serve import catalog, quantized, server  # noqa: PLC0415
    from tuneship.serve.dressed import dress  # noqa: PLC0415
    from tuneship.serve.keys import Keyring  # noqa: PLC0415

    try:
        settings = Serve(
            mode="adapters" if adapters or state else "merged",
            dtype=dtype,
            quantization=quantization,
            host=host,
            port=port,
            max_loras=max_loras,
            max_rank=max_rank,
            context_length=context_length,
            memory_fraction=memory_fraction,
            verify=verify,
            restarts=restarts,
            hang_timeout_s=hang_timeout,
            drain_s=drain,
            extra_args=tuple(extra_arg or ()),
        )
    except ValidationError as error:
        first = error.errors()[0]
        flag = f"--{str(first['loc'][0]).removesuffix('_s').replace('_', '-')}: " if first["loc"] else ""
        raise RecipeError(f"{flag}{first['msg'].removeprefix('Value error, ')}") from None
    keyring = Keyring(keys or keys_file())
    model = str(rundir.made(Path(model), "merge", "train"))
    name = name or quantized.public_name(model)
    catalog.check_names(model, *adapters or (), name=name)
    served = quantized.with_quantization(model, settings)
    log = log or cache_dir() / "logs" / f"serve-{port or os.getpid()}.log"
    with dress(chat_templates.resolve(template, Path.cwd()), log) as dressed:
        found = catalog.read(
            served, *adapters or (), max_rank=max_rank, name=name, to_come=state is not None, dress=dressed
        )
        if found.mode == "adapters" and port and state is None:
            state = state_dir() / f"{found.base.version.replace('/', '--')}-{port}"
        server.run(found, settings, server.Files(log, endpoint_file, state), server.Access(keyring, admin_port))
