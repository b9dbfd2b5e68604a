"""What SGLang is not started with, whatever the model: an old card, and arguments that would undo what we promise.

    require(recipe.serve, hardware.detect())     # before anything is built, trained or started

The installed SGLang's own kernels (sglang-kernel 0.4.5) are compiled for compute capability 8.0 and newer, none for
less. Its arguments are refused where they would let others reach the engine, write prompts down, or have it serve
something else than the door, the registry and verify know of; all others are handed on as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tuneship.core.errors import PreflightError
from tuneship.core.hardware import SERVES_FROM, Hardware
from tuneship.core.recipe import Serve

_LOOPBACK = "the engine listens on loopback, for the door alone: --host and --port (serve.host, serve.port) are its own"
_KEYS = "the door asks for keys: tuneship keys add NAME --models ALIAS"
_PROMPTS = "prompts are not written down; requests, latency and errors of every version are on /metrics and in top"
_ADAPTERS = "--adapters, and tuneship adapters load of a running server, check an adapter and give it its name"
_LIMITS = "--max-loras and --max-rank (serve.max_loras, serve.max_rank) are those that adapters are checked against"
_MODEL = "the model is the argument of serve (model.id), and --name what clients call it"
_TEMPLATE = "--template (data.template) gives a base another chat template, which verify compares with training's"
_BITS = "--quantization (serve.quantization) says in which bits a base is served"
_TLS = "the door speaks plain HTTP to the engine: put a proxy with TLS in front of the door"
_PLAINLY = "name each argument by itself"
_CODE = "a client would have the engine run code of its own"
_WEIGHTS = (
    "the weights are those on this disk, that verify knows of; they are neither taken from nor given to another server"
)
_CACHED = (
    "what was made of prompts stays in the engine's memory: --hicache-ratio and --hicache-size use the machine's too"
)
_KEPT = "an artifact is never changed: the files of a model stay where they are"
_HOOKS = "code in the engine's layers sees every prompt and changes answers behind verify's back"
_OVERLAP = (
    "with more adapters in use than slots the engine then does little but load and evict them; --max-loras "
    "(serve.max_loras) gives more slots"
)
_CUT = "a prompt that is too long is an error, never cut: --context-length (serve.context_length) allows longer ones"

REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("--host", "--port", "--grpc-mode", "--smg-grpc-mode", "--grpc-port"), _LOOPBACK),
    **dict.fromkeys(("--smg-http-sidecar-port", "--grpc-http-sidecar-port", "--sidecar", "--sidecar-args"), _LOOPBACK),
    **dict.fromkeys(("--dist-init-addr", "--nccl-init-addr"), _LOOPBACK),
    **dict.fromkeys(("--decoupled-spec-bind-endpoint", "--decoupled-spec-connect-endpoints"), _LOOPBACK),
    **dict.fromkeys(("--disaggregation-mode", "--disaggregation-bootstrap-port"), _LOOPBACK),
    **dict.fromkeys(("--encoder-only", "--language-only", "--encoder-urls"), _LOOPBACK),
    **dict.fromkeys(("--encoder-bootstrap-port", "--encoder-register-urls", "--tool-server"), _LOOPBACK),
    **dict.fromkeys(("--api-key", "--admin-api-key"), _KEYS),
    **dict.fromkeys(
        ("--log-requests", "--log-requests-level", "--log-requests-format", "--log-requests-target"), _PROMPTS
    ),
    **dict.fromkeys(("--crash-dump-folder", "--export-metrics-to-file", "--export-metrics-to-file-dir"), _PROMPTS),
    **dict.fromkeys(
        ("--kv-events-config", "--enable-forward-pass-metrics", "--forward-pass-metrics-ipc-name"), _PROMPTS
    ),
    **dict.fromkeys(("--enable-trace", "--trace-modules", "--otlp-traces-endpoint", "--spec-trace-dir"), _PROMPTS),
    **dict.fromkeys(
        ("--debug-tensor-dump-output-folder", "--debug-tensor-dump-layers", "--debug-tensor-dump-input-file"), _PROMPTS
    ),
    "--msprobe-dump-config": _PROMPTS,
    **dict.fromkeys(("--hicache-storage-backend", "--hicache-storage-backend-extra-config"), _CACHED),
    **dict.fromkeys(("--enable-lmcache", "--lmcache-config-file"), _CACHED),
    **dict.fromkeys(("--enable-flexkv", "--flexkv-config-file", "--radix-cache-backend"), _CACHED),
    **dict.fromkeys(("--weight-cache-mode", "--weight-cache-socket", "--modelexpress-config"), _WEIGHTS),
    **dict.fromkeys(("--custom-weight-loader", "--engine-info-bootstrap-port"), _WEIGHTS),
    **dict.fromkeys(
        (
            "--remote-instance-weight-loader-seed-instance-ip",
            "--remote-instance-weight-loader-seed-instance-service-port",
            "--remote-instance-weight-loader-send-weights-group-ports",
            "--remote-instance-weight-loader-start-seed-via-transfer-engine",
        ),
        _WEIGHTS,
    ),
    "--delete-ckpt-after-loading": _KEPT,
    **dict.fromkeys(("--lora-paths", "--enable-lora"), _ADAPTERS),
    **dict.fromkeys(
        ("--max-lora-rank", "--max-loras-per-batch", "--max-loaded-loras", "--lora-target-modules"), _LIMITS
    ),
    "--enable-lora-overlap-loading": _OVERLAP,
    **dict.fromkeys(("--model-path", "--model", "--served-model-name", "--revision", "--tokenizer-path"), _MODEL),
    **dict.fromkeys(("--chat-template", "--hf-chat-template-name"), _TEMPLATE),
    **dict.fromkeys(("--quantization", "--load-format"), _BITS),
    "--dtype": "--dtype (serve.dtype) says what is computed in, and verify goes by it",
    **dict.fromkeys(
        ("--ssl-keyfile", "--ssl-certfile", "--ssl-ca-certs", "--ssl-keyfile-password", "--enable-ssl-refresh"), _TLS
    ),
    "--enable-http2": _TLS,
    "--config": _PLAINLY,
    "--enable-custom-logit-processor": _CODE,
    "--forward-hooks": _HOOKS,
    "--allow-auto-truncate": _CUT,
}
"""{SGLang's argument: what there is instead}. Its other names are in it too."""


def require(serve: Serve, machine: Hardware) -> None:
    """Refuse a card or an argument before anything is started.

    Raises:
        PreflightError: SGLang has no kernels for a card of this machine, or `serve.extra_args` holds one of `REFUSED`.

    """
    _arguments(serve.extra_args)
    for gpu in machine.gpus:
        if gpu.capability < SERVES_FROM:
            has, wanted = (f"{major}.{minor}" for major, minor in (gpu.capability, SERVES_FROM))
            raise PreflightError(
                f"SGLang does not serve on {gpu.name} (compute capability {has}): its kernels start at {wanted}",
                hint="train and merge here (tuneship up RECIPE --until merge --serve.mode merged), and serve on a "
                f"card of compute capability {wanted} or newer; CUDA_VISIBLE_DEVICES chooses among several cards",
            )


def _arguments(extra_args: Sequence[str]) -> None:
    for word in extra_args:
        name = word.partition("=")[0]
        meant = _meant(name)
        if meant:
            raise PreflightError(f"SGLang is not given {name} by --extra-arg (serve.extra_args)", hint=REFUSED[meant])


def _meant(name: str) -> str:
    """Which of `REFUSED` this word stands for; empty: none. SGLang's argparse takes any beginning for the whole."""
    if name in REFUSED or not name.startswith("--") or name == "--":
        return name if name in REFUSED else ""
    return next((refused for refused in REFUSED if refused.startswith(name)), "")
