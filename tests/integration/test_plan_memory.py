"""The planner's arithmetic against SGLang: what it allocates for our flags, to the byte, and its share of a card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tuneship.core import hardware
from tuneship.core.model_source import BUNDLED_ID, resolve
from tuneship.core.recipe import Serve
from tuneship.serve import catalog, footprint, plan, quantized
from tuneship.serve.launch import LoadedAdapter, configure, environment, flags

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

HERE = Path(__file__).parent
CARDS_MIB = (8_192, 16_384, 24_564, 40_960, 46_068, 81_559, 143_771, 183_359)


def python(program: str, *words: str, env: dict[str, str] | None = None) -> Any:
    done = subprocess.run(
        [sys.executable, str(HERE / program), *words],
        capture_output=True, text=True, timeout=280, check=False, env={**os.environ, **(env or {})},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def allocated(model: Path, serve: Serve, adapters: Path | None, folder: Path) -> dict[str, int]:
    """What SGLang allocates when it is started as we start it."""
    found = catalog.read(str(model), *filter(None, [adapters]), max_rank=serve.max_rank)
    loaded = [LoadedAdapter(entry.selector, entry.path) for entry in found.entries if entry.selector]
    config = configure(serve, found, hardware.detect(), 31000, loaded)
    return python("allocated_bytes.py", *flags(config), env=environment(config, os.environ, folder))


def test_the_share_of_a_card_is_what_sglang_itself_would_take():
    assert python("sglangs_share.py", *map(str, CARDS_MIB)) == [plan.memory_fraction(mib) for mib in CARDS_MIB]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "quantization"), [("float32", "none"), ("bfloat16", "nf4")])
def test_every_term_is_sglangs_to_the_byte(
    tiny_model, marker_adapters, tmp_path, monkeypatch, dtype: Any, quantization: Any
):
    monkeypatch.setenv("TUNESHIP_CACHE", str(tmp_path / "cache"))
    serve = Serve(mode="adapters", dtype=dtype, quantization=quantization, max_loras=3, max_rank=16)
    model = Path(quantized.with_quantization(str(tiny_model), serve))
    real = allocated(model, serve, marker_adapters, tmp_path)
    check(model, tiny_model, serve, real)
    assert real["adapter_host"] == 3 * footprint.adapter_host_bytes(footprint.read(tiny_model).shape, 8)


@pytest.mark.slow
def test_of_a_model_that_can_speak_too(tmp_path):
    subprocess.run([sys.executable, "-m", "tuneship", "fetch", BUNDLED_ID], check=True)
    bundled = resolve(BUNDLED_ID).path
    serve = Serve(dtype="bfloat16")
    check(bundled, bundled, serve, allocated(bundled, serve, None, tmp_path))


def check(model: Path, original: Path, serve: Serve, real: dict[str, int]) -> None:
    """Hold a plan of `model`, and one made before it was packed, against what was allocated."""
    for folder in {model, original}:
        planned = plan.make(
            footprint.read(folder), serve, hardware.detect(),
            mode="adapters" if serve.mode == "adapters" else "merged", quantization=serve.quantization,
            needed_tokens=1,
        )  # fmt: skip
        assert planned.weights_bytes == real["weights"], folder
        assert planned.slots_bytes == real["slots"]
        assert planned.kv_tokens == real["kv_tokens"]
        # One token more, where SGLang writes what nobody reads.
        assert planned.kv_bytes * (real["kv_tokens"] + 1) == real["kv"] * real["kv_tokens"]
