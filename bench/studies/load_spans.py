"""Where the time of a load goes: calls of the server and of its engine, timed while `serve_gpu.py` loads adapters.

    python bench/studies/load_spans.py --out FILE [--skip 2] -- --servers nf4 --measure load --out load.json

What stands behind `--` is `serve_gpu.py`'s. Every call of `SERVER` and `ENGINE` is a line of `--spans`; the figures are
milliseconds since the load began and for how long, medians of all loads but the first `--skip`. To time one costs some
10 microseconds, and every process pays for reading this file.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.abc
import importlib.util
import inspect
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

VARIABLE = "LOAD_SPANS"
WHOLE = "Deployer.load"
SERVER = (
    "deploy:Deployer.load", "preflight.apart:Checker.check", "store:AdapterStore.begin", "store:AdapterStore.copy",
    "registry:Registry.add", "store:AdapterStore.flush", "preflight.apart:Checker.sound", "engine_adapters:load",
    "preflight.apart:Checker.prove", "engine_adapters:answer_once", "verify.engine:EngineScorer.logprobs",
    "verify.engine:EngineScorer.tokenize", "judging:verify", "deploy:Deployer._arrived",
)  # fmt: skip
ENGINE = (
    "managers.tokenizer_manager:TokenizerManager.load_lora_adapter", "lora.lora_manager:LoRAManager.load_lora_adapter",
    "lora.lora:LoRAAdapter.__init__", "lora.lora:LoRAAdapter.initialize_weights",
    "lora.lora:LoRAAdapter._normalize_weights", "lora.lora_manager:LoRAManager.fetch_new_loras",
    "managers.scheduler:Scheduler.run_batch", "model_executor.model_runner:ModelRunner.forward",
    "layers.logits_processor:LogitsProcessor.forward", "managers.scheduler:Scheduler.process_batch_result",
)  # fmt: skip
_LAST_IMPORTED = {
    "tuneship.serve.assembly": ("tuneship.serve", SERVER),
    "sglang.srt.managers.scheduler": ("sglang.srt", ENGINE),
}
"""{module: what can be timed when it has been imported}."""


class Span(NamedTuple):
    """One call; milliseconds, the beginning since the epoch."""

    began: float
    took: float
    name: str


def main() -> None:
    """Run the study with every process of it timed, and write the medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--spans", type=Path, default=Path("load-spans.jsonl"))
    parser.add_argument("--skip", type=int, default=2)
    parser.add_argument("study", nargs="+")
    asked = parser.parse_args()
    asked.spans.unlink(missing_ok=True)
    here = Path(__file__).resolve().parent
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "sitecustomize.py").write_text("import load_spans\nload_spans.hang_in()\n", encoding="utf-8")
        paths = [folder, str(here), *filter(None, [os.environ.get("PYTHONPATH")])]
        timed = os.environ | {VARIABLE: str(asked.spans.absolute()), "PYTHONPATH": os.pathsep.join(paths)}
        subprocess.run([sys.executable, here / "serve_gpu.py", *asked.study], env=timed, check=True)
    loads = _loads(asked.spans)[asked.skip :]
    spans = _medians(loads)
    result = {"command": shlex.join(["python", *sys.argv]), "loads": len(loads), "spans": spans}
    asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, (began, took) in spans.items():
        print(f"{began:8.1f} {took:8.1f}  {name}")


def hang_in() -> None:
    """In every process of the study: time the calls of a module when that is imported."""
    if os.environ.get(VARIABLE):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds what the others find."""

    def __init__(self) -> None:
        self._left = dict(_LAST_IMPORTED)

    def find_spec(self, name: str, *_: object) -> Any:
        if name not in self._left:
            return None
        package, targets = self._left.pop(name)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        runs = spec.loader.exec_module

        def run(module: Any) -> None:
            runs(module)
            for target in targets:
                _time(f"{package}.{target}")

        spec.loader.exec_module = run  # type: ignore[method-assign]
        return spec


def _time(target: str) -> None:
    """Replace `module:owner.function` by one that is timed."""
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    setattr(owner, name, _timed(getattr(owner, name), path if owners else f"{module.rpartition('.')[2]}.{path}"))


def _timed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    async def waits(*given: Any, **named: Any) -> Any:
        began = time.time()
        try:
            return await function(*given, **named)
        finally:
            _write(name, began)

    def calls(*given: Any, **named: Any) -> Any:
        began = time.time()
        try:
            return function(*given, **named)
        finally:
            _write(name, began)

    return functools.wraps(function)(waits if inspect.iscoroutinefunction(function) else calls)


def _write(name: str, began: float) -> None:
    span = Span(1e3 * began, 1e3 * (time.time() - began), name)
    with Path(os.environ[VARIABLE]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(span) + "\n")


def _loads(file: Path) -> list[list[Span]]:
    """The calls that began within each load, from its own on."""
    spans = sorted(Span(*json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines())
    wholes = [span for span in spans if span.name == WHOLE]
    return [[span for span in spans if 0 <= span.began - load.began <= load.took] for load in wholes]


def _medians(loads: Sequence[Sequence[Span]]) -> dict[str, tuple[float, float]]:
    """{call: (begins, takes)}, the second of a kind apart from the first, in the order in which they begin."""
    found: dict[str, list[tuple[float, float]]] = {}
    for load in loads:
        seen = Counter[str]()
        for span in load:
            seen[span.name] += 1
            number = f" {seen[span.name]}" if seen[span.name] > 1 else ""
            found.setdefault(span.name + number, []).append((span.began - load[0].began, span.took))
    often = {name: zip(*each, strict=True) for name, each in found.items() if 2 * len(each) >= len(loads)}
    medians = {name: (_median(began), _median(took)) for name, (began, took) in often.items()}
    return dict(sorted(medians.items(), key=lambda item: item[1]))


def _median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 1)


if __name__ == "__main__":
    main()
