"""Where a QLoRA step's time goes on a GPU: variants of the training path on one card in one run.

    PYTHONPATH=SITE python3 bench/studies/train_speed.py --out FILE
    python bench/studies/train_speed.py --device cpu --tiny --out FILE      # does every variant run at all?

Qwen2.5-1.5B's shape with random weights, NF4, rank 16 on all seven linears, dropout 0, 1,024 tokens a row without
padding, bf16, SDPA, paged 8-bit AdamW; 64 rows a step, the same 64 in every step, so that first losses can be compared.
Each group of variants runs in a process of its own under a limit of time; every variant appends one JSON line to
`--out`: {name, tokens_per_s, step_s, peak_gib, reserved_gib, losses, grad_norms, micro_batch, accumulation, ...}.
`peak_gib` is PyTorch's own peak of allocated memory, as in earlier measurements.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROWS, LENGTH, RANK = 64, 1024, 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GIB = 2**30


class Size(NamedTuple):
    """A Qwen2 decoder's dimensions, and how much it is given."""

    hidden: int = 1536
    intermediate: int = 8960
    layers: int = 28
    heads: int = 12
    kv_heads: int = 2
    vocab: int = 151936
    rows: int = ROWS
    length: int = LENGTH


TINY = Size(64, 160, 3, 4, 2, 256, 8, 32)


class Variant(NamedTuple):
    """One way to run the same step. `spared`: layers that keep their activations beside checkpointed ones."""

    name: str
    micro: int
    checkpointing: bool = True
    spared: int = 0
    fused: bool = False
    mlps: bool = True
    liger: bool = False
    autocast: bool = True
    adapters: str = "bfloat16"
    compiled: str = ""
    selective: bool = False
    steps: int = 4
    profile: bool = False


GROUPS: dict[str, tuple[int, list[Variant]]] = {
    "target": (
        150,
        [
            Variant("fused-liger-32x2", 32, fused=True, liger=True),
            Variant("fused-liger-32x2-no-autocast", 32, fused=True, liger=True, autocast=False),
            Variant("fused-compiled-32x2", 32, fused=True, compiled="static"),
            Variant("fused-compiled-16x4-spared-4", 16, spared=4, fused=True, compiled="static"),
        ],
    ),
    "fused": (
        180,
        [
            Variant("peft-64x1", 64, steps=3),
            Variant("fused-64x1", 64, fused=True, steps=3),
            Variant("fused-liger-16x4", 16, fused=True, liger=True),
            Variant("fused-liger-4x16-kept", 4, checkpointing=False, fused=True, liger=True),
            Variant("fused-liger-4x16-kept-profile", 4, checkpointing=False, fused=True, liger=True, profile=True),
            Variant(
                "fused-liger-4x16-kept-no-autocast", 4, checkpointing=False, fused=True, liger=True, autocast=False
            ),
            Variant("fused-liger-2x32-kept", 2, checkpointing=False, fused=True, liger=True),
            Variant("fused-liger-4x16-spared-23", 4, spared=23, fused=True, liger=True),
            Variant("fused-liger-8x8-spared-10", 8, spared=10, fused=True, liger=True),
            Variant("fused-liger-8x8-kept", 8, checkpointing=False, fused=True, liger=True),
            Variant("fused-liger-64x1", 64, fused=True, liger=True),
            Variant("fused-liger-4x16-kept-fp32", 4, checkpointing=False, fused=True, liger=True, adapters="float32"),
            Variant("fused-linears-liger-16x4", 16, fused=True, mlps=False, liger=True),
        ],
    ),
    "plain": (
        75,
        [
            Variant("peft-16x4", 16, steps=3),
            Variant("peft-4x16-kept", 4, checkpointing=False, steps=3),
            Variant("peft-selective-16x4", 16, selective=True, steps=3),
            Variant("peft-liger-64x1", 64, liger=True, steps=3),
        ],
    ),
    "compiled": (
        170,
        [
            Variant("fused-compiled-4x16-kept", 4, checkpointing=False, fused=True, compiled="static"),
            Variant("fused-compiled-8x8-spared-10", 8, spared=10, fused=True, compiled="static"),
            Variant("fused-compiled-16x4", 16, fused=True, compiled="static"),
            Variant("fused-compiled-dynamic-4x16-kept", 4, checkpointing=False, fused=True, compiled="dynamic"),
            Variant("peft-compiled-16x4", 16, compiled="static"),
            Variant("peft-compiled-4x16-kept", 4, checkpointing=False, compiled="static"),
        ],
    ),
}


def main() -> None:
    """Make the base, then run the groups, each in its own process and under its limit."""
    args = _parse()
    if args.group:
        _run_group(args)
        return
    folder = Path(tempfile.mkdtemp(prefix="train-speed-"))
    base = [sys.executable, __file__, "--base", str(folder / "base"), "--out", args.out, "--device", args.device]
    base += ["--tiny"] * args.tiny + (["--only", args.only] if args.only else [])
    began = time.perf_counter()
    _child([*base, "--group", "write"], 90)
    wanted = args.groups.split(",")
    for group in wanted:
        _child([*base, "--group", group], GROUPS[group][0] if not args.tiny else 600)
        print(f"# {group}: {time.perf_counter() - began:.0f} s since the start", flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True, help="JSON lines are appended here")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="a shape for a dry run")
    parser.add_argument("--groups", default="target,fused,compiled,plain", help="which, in this order")
    parser.add_argument("--only", default="", help="names of variants, by comma")
    parser.add_argument("--group", default="", help=argparse.SUPPRESS)
    parser.add_argument("--base", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def _child(command: list[str], limit_s: float) -> None:
    environment = dict(os.environ, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", WANDB_DISABLED="true")
    environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    try:
        code = subprocess.run(command, env=environment, timeout=limit_s, check=False).returncode
        if code:
            print(f"# {command[-1]} ended with {code}", flush=True)
    except subprocess.TimeoutExpired:
        print(f"# {command[-1]} ran into its limit of {limit_s} s", flush=True)


def _run_group(args: argparse.Namespace) -> None:
    size = TINY if args.tiny else Size()
    if args.group == "write":
        _write_base(Path(args.base), size, args.device)
    else:
        _variants(args, size)


def _report(out: str, record: dict[str, Any]) -> None:
    line = json.dumps(record)
    print(line, flush=True)
    with Path(out).open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def _write_base(path: Path, size: Size, device: str) -> None:
    import torch  # noqa: PLC0415 - takes seconds
    from tokenizers import Tokenizer, models  # type: ignore[import-untyped]  # noqa: PLC0415
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM  # noqa: PLC0415

    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3} | {f"w{i}": i for i in range(4, min(size.vocab, 512))}
    config = Qwen2Config(
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        vocab_size=size.vocab,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))  # noqa: S106
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)


def _rows(size: Size) -> list[dict[str, list[int]]]:
    import numpy as np  # noqa: PLC0415

    ids = np.random.default_rng(0).integers(4, size.vocab, (size.rows, size.length)).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def _variants(args: argparse.Namespace, size: Size) -> None:
    import torch  # noqa: PLC0415

    from tuneship.core.recipe import Model, Quantization  # noqa: PLC0415
    from tuneship.train.model import load_base  # noqa: PLC0415

    began = time.perf_counter()
    base = load_base(Path(args.base), Model(id="random", dtype="bfloat16"), Quantization())
    print(f"# base loaded in {time.perf_counter() - began:.1f} s", flush=True)
    only = set(filter(None, args.only.split(",")))
    for variant in GROUPS[args.group][1]:
        if only and variant.name not in only:
            continue
        began = time.perf_counter()
        try:
            record = _measure(base, Path(args.base), variant, size, args.device)
        except Exception as error:  # noqa: BLE001 - the next variant may still tell something
            record = {"name": variant.name, "error": f"{type(error).__name__}: {str(error)[:400]}"}
        _report(args.out, record | {"wall_s": round(time.perf_counter() - began, 1)})
        _clean(base)
        if args.device == "cuda":
            torch.cuda.empty_cache()


def _clean(base: Any) -> None:
    """Undo what a variant put into the base that all of a group share."""
    from transformers.models.qwen2 import modeling_qwen2  # noqa: PLC0415

    for module in base.modules():
        module.__dict__.pop("forward", None)
        module._compiled_call_impl = None
    if not hasattr(modeling_qwen2, "_own_rope"):
        modeling_qwen2._own_rope = modeling_qwen2.apply_rotary_pos_emb
    modeling_qwen2.apply_rotary_pos_emb = modeling_qwen2._own_rope
    base.gradient_checkpointing_disable()
    with contextlib.suppress(AttributeError):  # it was not enabled
        base.disable_input_require_grads()
    gc.collect()


def _measure(base: Any, path: Path, variant: Variant, size: Size, device: str) -> dict[str, Any]:
    import datasets  # noqa: PLC0415
    import torch  # noqa: PLC0415
    from step_timer import StepTimer  # noqa: PLC0415
    from transformers import AutoTokenizer  # noqa: PLC0415
    from trl import SFTConfig, SFTTrainer  # noqa: PLC0415

    from tuneship.core.recipe import Lora  # noqa: PLC0415
    from tuneship.train.model import lora_config  # noqa: PLC0415

    cuda = device == "cuda"
    _clean(base)
    micro = min(variant.micro, size.rows)
    accumulation = size.rows // micro
    arguments = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        max_steps=variant.steps,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        optim="paged_adamw_8bit" if cuda else "adamw_torch",
        max_grad_norm=0.3,
        gradient_checkpointing=variant.checkpointing,
        gradient_checkpointing_kwargs={"selective": True} if variant.selective else None,
        bf16=variant.autocast,
        use_cpu=not cuda,
        seed=0,
        data_seed=0,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    timer = StepTimer(profiled=variant.steps if variant.profile else 0)
    trainer = SFTTrainer(
        model=base,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(_rows(size)),
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=lora_config(Lora(rank=RANK, alpha=2 * RANK), base),
        callbacks=[timer],
    )
    _quiet(trainer)
    try:
        installed = _apply(trainer.model, base, variant)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        _spare(trainer, base, variant.spared)
        trainer.train()
    finally:
        memory = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if cuda else (0, 0)
        trainer.model.unload()
    return _record(variant.name, timer, size, micro, memory) | {
        "checkpointing": variant.checkpointing,
        "spared": variant.spared,
        **({"installed": installed} if installed else {}),
        **({"profile": timer.table} if timer.table else {}),
    }


def _quiet(trainer: Any) -> None:
    from transformers import PrinterCallback  # noqa: PLC0415

    trainer.remove_callback(PrinterCallback)


def _spare(trainer: Any, base: Any, layers: int) -> None:
    from transformers import TrainerCallback  # noqa: PLC0415

    class Spare(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            for layer in base.model.layers[:layers]:
                layer.gradient_checkpointing = False

    trainer.add_callback(Spare())


def _apply(model: Any, base: Any, variant: Variant) -> dict[str, int]:
    import torch  # noqa: PLC0415

    installed: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(getattr(torch, variant.adapters))
    if variant.liger and base.device.type == "cuda":
        from liger_kernel.transformers import monkey_patch  # noqa: PLC0415

        monkey_patch._apply_liger_kernel_to_instance(
            model=base,
            rope=True,
            rms_norm=True,
            swiglu=not (variant.fused and variant.mlps),
            cross_entropy=False,
            fused_linear_cross_entropy=False,
        )
    if variant.fused:
        from tuneship.train.kernels import fused  # noqa: PLC0415

        installed = fused.install(model, mlps=variant.mlps)._asdict()
    if variant.compiled:
        torch._dynamo.reset()
        base.enable_input_require_grads()  # else the first layer is a graph of its own, compiled for itself
        for layer in base.model.layers:
            layer.compile(dynamic=variant.compiled == "dynamic")
    return installed


def _record(name: str, timer: Any, size: Size, micro: int, memory: tuple[int, int]) -> dict[str, Any]:
    steady = timer.step_s[1:] or timer.step_s
    step_s = statistics.median(steady)
    return {
        "name": name,
        "tokens_per_s": round(size.rows * size.length / step_s),
        "step_s": [round(s, 3) for s in timer.step_s],
        "peak_gib": round(memory[0] / GIB, 2),
        "reserved_gib": round(memory[1] / GIB, 2),
        "losses": timer.losses,
        "grad_norms": timer.grad_norms,
        "micro_batch": micro,
        "accumulation": size.rows // micro,
    }


if __name__ == "__main__":
    main()
