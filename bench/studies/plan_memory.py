"""What the planner says a training step takes on the device, beside what it does take: the process's peak, by NVML.

    PYTHONPATH=SITE python3 bench/studies/plan_memory.py --out FILE
    python bench/studies/plan_memory.py --device cpu --tiny --out FILE       # does it run at all?

A process for each shape (NF4, random weights made on the device). For every point of it a small probe (`probe.py`)
estimates the peak of the point's batch, and arithmetic alone (`memory.py`) says what it would have said. Then the step
runs under the point's budget; where that runs out it runs again without one, so that the estimate can be judged.
Appends JSON lines {shape, length, batch, kept_layers, kernels, budget_gib, estimated_gib, arithmetic_gib, measured_gib,
error, fits, ran_out, by_process, ...}. `measured_gib` is the largest reading of NVML during the steps, CUDA's context
included; `by_process` whether it is what NVML says of this process, or else of the device. A file made of these lines
keeps both: without the second nobody can tell what the first one is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import pynvml

from tuneship.core.hardware import visible_gpus

GIB = 2**30
LIMIT_S = 100


class Dimensions(NamedTuple):
    """Of a Qwen2 decoder."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool


SHAPES = {
    "1.5b": Dimensions(1536, 8960, 28, 12, 2, 151936, True),
    "7b": Dimensions(4096, 14336, 32, 32, 8, 32768, False),
    "3b": Dimensions(2048, 11008, 36, 16, 2, 151936, True),
    "0.5b": Dimensions(896, 4864, 24, 14, 2, 151936, True),
}
TINY = Dimensions(64, 160, 3, 4, 2, 256, True)


class Point(NamedTuple):
    """One step. `kept`: layers that keep their activations; -1 is all."""

    shape: str
    length: int
    batch: int
    kept: int
    kernels: str
    budget_gib: int


POINTS = [
    Point("1.5b", 1024, 64, 0, "peft", 12),  # runs out
    Point("1.5b", 1024, 64, 0, "peft", 24),
    Point("1.5b", 1024, 16, 0, "peft", 8),
    Point("1.5b", 1024, 16, -1, "peft", 80),
    Point("1.5b", 1024, 16, 10, "fused", 16),
    Point("7b", 512, 8, 0, "peft", 8),
    Point("7b", 2048, 16, 0, "peft", 16),  # runs out
    Point("7b", 1024, 16, 0, "fused", 16),
    Point("3b", 2048, 8, 0, "peft", 12),
    Point("3b", 512, 32, 12, "fused", 24),
    Point("0.5b", 512, 8, -1, "peft", 8),
    Point("0.5b", 4096, 8, 0, "peft", 8),
]


def main() -> None:
    """Each shape in a process of its own, under a limit of time."""
    args = _parse()
    if args.shape:
        _shape(args)
        return
    began = time.perf_counter()
    for shape in args.shapes.split(","):
        command = [sys.executable, __file__, "--shape", shape, "--out", args.out, "--device", args.device]
        environment = dict(os.environ, HF_HUB_OFFLINE="1", PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True")
        try:
            subprocess.run([*command, *["--tiny"] * args.tiny], env=environment, timeout=args.limit_s, check=False)
        except subprocess.TimeoutExpired:
            print(f"# {shape} ran into its limit of {args.limit_s} s", flush=True)
        print(f"# {shape}: {time.perf_counter() - began:.0f} s since the start", flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True, help="JSON lines are appended here")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="a shape for a dry run")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="which, in this order")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="of each shape")
    parser.add_argument("--shape", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def _shape(args: argparse.Namespace) -> None:
    meter = Meter()  # before CUDA: what others use is not ours
    import torch  # noqa: PLC0415 - takes seconds

    from tuneship.core.shape import Shape  # noqa: PLC0415

    dimensions = TINY if args.tiny else SHAPES[args.shape]
    base, tokenizer = _model(dimensions, args.device)
    shape = Shape.of(base.config.to_dict())
    for point in (point for point in POINTS if point.shape == args.shape):
        scaled = point._replace(length=32, batch=min(point.batch, 4), kept=min(point.kept, 2)) if args.tiny else point
        try:
            record = _measure(base, tokenizer, shape, scaled, meter)
        except Exception as error:  # noqa: BLE001 - the next point may still tell something
            record = scaled._asdict() | {"failed": f"{type(error).__name__}: {str(error)[:400]}"}
            if torch.cuda.is_available():
                torch.cuda.set_per_process_memory_fraction(1.0)
        line = json.dumps(record)
        print(line, flush=True)
        with Path(args.out).open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def _measure(base: Any, tokenizer: Any, shape: Any, point: Point, meter: Meter) -> dict[str, Any]:
    import torch  # noqa: PLC0415

    from tuneship.core.recipe import Recipe  # noqa: PLC0415
    from tuneship.train.planning import memory, probe  # noqa: PLC0415
    from tuneship.train.planning.memory import Setting  # noqa: PLC0415

    recipe = Recipe.model_validate(
        {"model": {"id": "random"}, "data": {"train": "none"}, "train": {"kernels": point.kernels}}
    )
    kept = shape.layers if point.kept < 0 else point.kept
    setting = Setting(point.batch, kept)
    began = time.perf_counter()
    most = max(point.batch // 2, 1)
    line = probe.calibrate(
        base, tokenizer, recipe, point.length, again=most * (kept < shape.layers), kept=most * (kept > 0)
    )
    estimated = line.peak_bytes(setting)
    probed_s = time.perf_counter() - began
    arithmetic = memory.estimate(recipe, shape, setting, point.length)

    def run() -> Any:
        return probe.measure(base, tokenizer, recipe, setting, point.length)

    cuda = torch.cuda.is_available()
    if cuda:
        # The budget is the whole process's: what lies outside PyTorch is taken off.
        room = point.budget_gib * GIB - probe.outside_bytes()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(room / total, 1.0))
    meter.reset()
    ran = run()
    ran_out = ran is None
    if cuda:
        torch.cuda.set_per_process_memory_fraction(1.0)
    if ran_out:
        meter.reset()
        ran = run()
    measured = meter.peak_bytes()
    return {
        **point._asdict(),
        "kept": kept,
        "estimated_gib": round(estimated / GIB, 3),
        "arithmetic_gib": round(arithmetic.total / GIB, 3),
        "measured_gib": round(measured / GIB, 3),
        "error": round(estimated / measured - 1, 4) if measured else None,
        "said_to_fit": estimated <= point.budget_gib * GIB,
        "ran_out": ran_out,
        "by_pytorch_gib": round(ran.peak_bytes / GIB, 3) if ran else None,
        "step_s": round(ran.step_s, 3) if ran else None,
        "estimated_step_s": round(line.step_s(setting), 3),
        "terms_gib": {name: round(value / GIB, 3) for name, value in arithmetic._asdict().items()},
        "probe": [(s.setting.micro_batch, round(s.peak_bytes / GIB, 3)) for s in line.again + line.kept],
        "probed_s": round(probed_s, 1),
        "by_process": meter.by_process,
    }


class Meter:
    """NVML's reading of this process's memory on the device, taken every few milliseconds; its largest.

    Where NVML lists no processes (some virtual machines) it is the device's, less what was used before.
    """

    def __init__(self) -> None:
        self.by_process = False
        self._largest = 0
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError:
            return
        self._handle = visible_gpus()[0]
        self._before = int(pynvml.nvmlDeviceGetMemoryInfo(self._handle).used)
        threading.Thread(target=self._watch, daemon=True).start()

    def reset(self) -> None:
        """Forget what was read."""
        self._largest = 0

    def peak_bytes(self) -> int:
        """The largest since then."""
        return self._largest

    def _watch(self) -> None:
        while True:
            self._largest = max(self._largest, self._now())
            time.sleep(0.005)

    def _now(self) -> int:
        listed = pynvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        mine = [process.usedGpuMemory for process in listed if process.pid == os.getpid()]
        self.by_process = bool(mine and mine[0])
        if self.by_process:
            return int(mine[0])
        return int(pynvml.nvmlDeviceGetMemoryInfo(self._handle).used) - self._before


def _model(dimensions: Dimensions, device: str) -> tuple[Any, Any]:
    """A model as loading in 4 bits makes it, of random weights, layer by layer: no checkpoint is written."""
    import torch  # noqa: PLC0415
    from bitsandbytes.nn import Linear4bit, Params4bit  # noqa: PLC0415
    from tokenizers import Tokenizer, models  # type: ignore[import-untyped]  # noqa: PLC0415
    from transformers import (  # noqa: PLC0415
        AutoModelForCausalLM,
        BitsAndBytesConfig,
        PreTrainedTokenizerFast,
        Qwen2Config,
    )
    from transformers.quantizers import AutoHfQuantizer  # noqa: PLC0415

    config = Qwen2Config(
        hidden_size=dimensions.hidden,
        intermediate_size=dimensions.intermediate,
        num_hidden_layers=dimensions.layers,
        num_attention_heads=dimensions.heads,
        num_key_value_heads=dimensions.kv_heads,
        vocab_size=dimensions.vocab,
        tie_word_embeddings=dimensions.tied,
        max_position_embeddings=32768,
        attn_implementation="sdpa",
    )
    packing = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    quantizer = AutoHfQuantizer.from_config(packing)
    quantizer.preprocess_model(model, device_map=None)
    torch.manual_seed(0)
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            packs = isinstance(module, Linear4bit) and name == "weight"
            shape = (module.out_features, module.in_features) if packs else parameter.shape
            value = torch.randn(shape, dtype=torch.bfloat16, device=device) * 0.02
            if packs:
                packed = Params4bit(
                    value, requires_grad=False, quant_type="nf4", compress_statistics=True, module=module
                )
                module.weight = packed._quantize(torch.device(device))
            else:
                module._parameters[name] = torch.nn.Parameter(value, requires_grad=False)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config, device=torch.device(device))
    model.is_quantized = model.is_loaded_in_4bit = True
    model.hf_quantizer, model.config.quantization_config = quantizer, packing
    if device == "cuda":
        model.hf_device_map = {"": torch.device("cuda:0")}
    model.config.use_cache = False
    words = {"<unk>": 0, "</s>": 1, "<pad>": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),  # noqa: S106
        unk_token="<unk>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
        pad_token="<pad>",  # noqa: S106
    )
    return model.eval(), tokenizer


if __name__ == "__main__":
    main()
