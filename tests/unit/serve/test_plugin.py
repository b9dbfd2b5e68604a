"""Installing tuneship changes nobody's SGLang."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from tuneship.core import hardware

GROUP = "sglang.srt.platforms"
ACTIVATE = """
import json, sys
from importlib.metadata import entry_points
(ours,) = [entry for entry in entry_points(group="sglang.srt.platforms") if entry.name == "tuneship_cpu"]
answer = ours.load()()
print(json.dumps({"answer": answer, "modules": sorted(sys.modules)}))
"""


def activate(**environment: str) -> dict:
    plain = {key: value for key, value in os.environ.items() if key != "TUNESHIP_ENGINE"}
    done = subprocess.run(
        [sys.executable, "-c", ACTIVATE], env=plain | environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_it_is_registered():
    values = [entry.value for entry in entry_points(group=GROUP) if entry.name == "tuneship_cpu"]
    assert values == ["tuneship.serve.sglang_plugin.platform:activate"]


@pytest.mark.parametrize("environment", [{}, {"TUNESHIP_ENGINE": ""}, {"TUNESHIP_ENGINE": "0"}])
def test_it_is_silent_and_light_in_other_peoples_engines(environment):
    seen = activate(**environment)
    assert seen["answer"] is None
    assert not {"torch", "sglang", "numpy", "pydantic", "psutil"} & set(seen["modules"])


def test_it_speaks_up_in_ours():
    answer = activate(TUNESHIP_ENGINE="1")["answer"]
    expected = None if hardware.detect().gpus else "tuneship.serve.sglang_plugin.cpu:CpuPlatform"
    assert answer == expected


def test_upstream_still_pins_without_asking():
    """When this fails, SGLang's LoRA code asks for pinned memory properly: try without `pinned_memory.py`."""
    (sglang,) = find_spec("sglang").submodule_search_locations
    lora = Path(sglang) / "srt" / "lora"
    for name in ("layers.py", "backend/torch_backend.py"):
        source = (lora / name).read_text()
        assert "pin_memory=True" in source
        assert "is_pin_memory_available" not in source


ENGINE = """
import subprocess, sys, time
from tuneship.serve.sglang_plugin import platform
platform._end_with_the_engine()
worker = "import time; from tuneship.serve.sglang_plugin import platform; time.sleep({late}); "
worker += "platform._end_with_the_engine(); time.sleep(60)"
print(subprocess.Popen([sys.executable, "-c", worker]).pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("late", [0, 2], ids=["before the engine died", "after it"])
def test_a_worker_ends_with_the_engine_whenever_it_asks(late):
    engine = subprocess.Popen([sys.executable, "-c", ENGINE.format(late=late)], stdout=subprocess.PIPE, text=True)
    with engine:
        worker = psutil.Process(int(engine.stdout.readline()))
        time.sleep(1)
        assert worker.is_running()
        engine.kill()
    gone, _ = psutil.wait_procs([worker], timeout=10)
    assert gone == [worker]
