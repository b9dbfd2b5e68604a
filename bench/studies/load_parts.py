"""What a load does beside the engine, part by part, each alone: adapters of a real shape, without a GPU or an engine.

    python bench/studies/load_parts.py --out FILE [--shape 1.5b] [--loads 12] [--work load-parts]

Milliseconds, median and largest, of a plain PEFT directory and of an artifact made of it. Every adapter is a new one,
read from the page cache as one that was just written or copied is.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from served_shapes import SHAPES, Layers, write_adapter

from tuneship.core import artifact, hardware
from tuneship.core.artifact import Base, Manifest, QuantizationRecord, TemplateRecord
from tuneship.serve import preflight
from tuneship.serve.preflight import BaseModel, CheckedAdapter
from tuneship.serve.registry import Registry
from tuneship.serve.store import AdapterStore

_T = TypeVar("_T")
_R = TypeVar("_R")


def main() -> None:
    """Write adapters, time every part, write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="1.5b")
    parser.add_argument("--loads", type=int, default=12)
    parser.add_argument("--work", type=Path, default=Path("load-parts"))
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    shutil.rmtree(asked.work, ignore_errors=True)
    base = _base(SHAPES[asked.shape], asked.work / "base")
    plain = [write_adapter(asked.shape, asked.work / "plain" / f"a{number}", number) for number in range(asked.loads)]
    result: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": hardware.detect().as_record(),
        "adapter_bytes": (plain[0] / "adapter_model.safetensors").stat().st_size,
        "plain_ms": _parts(plain, base, asked.work / "of-plain"),
        "sealed_ms": _parts([_seal(path, base) for path in plain], base, asked.work / "of-sealed"),
    }
    asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def _parts(paths: Sequence[Path], base: BaseModel, work: Path) -> dict[str, tuple[float, float]]:
    figures: dict[str, tuple[float, float]] = {}

    def timed(name: str, part: Callable[[_T], _R], each: Sequence[_T]) -> list[_R]:
        found, spent = [], []
        for one in each:
            began = time.perf_counter()
            found.append(part(one))
            spent.append(1e3 * (time.perf_counter() - began))
        figures[name] = (round(statistics.median(spent), 2), round(max(spent), 2))
        return found

    store = AdapterStore(work / "store")
    timed("whole check", lambda path: preflight.check(path, base), paths)
    checked = timed("fits", lambda path: preflight.fits(path, base), paths)
    begun = timed("copy", store.begin, paths)
    kept = timed("take the copy", lambda pair: store.copy(*pair), list(zip(checked, begun, strict=True)))
    pairs: list[tuple[CheckedAdapter, Path]] = list(zip(checked, kept, strict=True))
    timed("sound", lambda pair: preflight.sound(*pair, base), pairs)
    timed("prove", lambda pair: preflight.prove(*pair), pairs)
    timed("flush", store.flush, kept)
    with Registry.open(work / "registry.sqlite", "b" * 64, "base") as registry:

        def arrive(name: str) -> None:
            with registry.at_once():
                registry.loaded(name, "passed")
                registry.promote(name)

        versions = timed("write down", lambda pair: registry.add("sql", pair[0].content_id, pair[1]), pairs)
        timed("let it answer", arrive, [version.name for version in versions])
    return figures


def _base(size: Layers, path: Path) -> BaseModel:
    """A base as far as adapters are held against it; its weights are nowhere."""
    path.mkdir(parents=True)
    kv = size.hidden // size.heads * size.kv_heads
    shapes = {
        "self_attn.q_proj": (size.hidden, size.hidden), "self_attn.k_proj": (kv, size.hidden),
        "self_attn.v_proj": (kv, size.hidden), "self_attn.o_proj": (size.hidden, size.hidden),
        "mlp.gate_proj": (size.intermediate, size.hidden), "mlp.up_proj": (size.intermediate, size.hidden),
        "mlp.down_proj": (size.hidden, size.intermediate),
    }  # fmt: skip
    linear = {f"model.layers.{n}.{name}": shape for n in range(size.layers) for name, shape in shapes.items()}
    record = Base(id="base", revision="main", weights_sha256="0" * 64, architecture="Qwen2ForCausalLM")
    return BaseModel(path, record, "t", "t", linear, 49152)


def _seal(path: Path, base: BaseModel) -> Path:
    with artifact.draft(path.parent.parent / "sealed") as work:
        shutil.copytree(path, work, dirs_exist_ok=True)
        made = Manifest(
            kind="adapter", input_id="0" * 64, name="sql", base=base.record,
            quantization=QuantizationRecord(method="none", double=False, compute_dtype="bfloat16"),
            template=TemplateRecord(text="", sha256="t", source="model"), end_token_ids=(2,), tokenizer_sha256="t",
        )  # fmt: skip
        return artifact.seal(work, made).path


if __name__ == "__main__":
    main()
