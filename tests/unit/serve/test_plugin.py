"""Installing tuneship changes nobody's SGLang."""

from __future__ import annotations

import subprocess
import sys
import time
from importlib.metadata import entry_points

import psutil
import pytest

from tests.unit.serve.installed import run_python, sglang_source
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
    return run_python(ACTIVATE, **environment)


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
    for name in ("lora/layers.py", "lora/backend/torch_backend.py"):
        source = sglang_source(name)
        assert "pin_memory=True" in source
        assert "is_pin_memory_available" not in source


GENERAL = """
import json, sys
from importlib.metadata import entry_points
(ours,) = [entry for entry in entry_points(group="sglang.srt.plugins") if entry.name == "tuneship"]
ours.load()()
hooks = sys.modules.get("sglang.srt.plugins.hook_registry")
print(json.dumps({"hooks": sorted(hooks.HookRegistry._hooks) if hooks else [], "modules": sorted(sys.modules)}))
"""


@pytest.mark.parametrize("variable", ["", "0"])
def test_the_general_plugin_is_silent_and_light_in_other_peoples_engines(variable):
    seen = run_python(GENERAL, TUNESHIP_ENGINE=variable)
    assert seen["hooks"] == []
    assert not {"torch", "sglang", "numpy", "pydantic", "psutil"} & set(seen["modules"])


IN_OURS = """
import json, sys, torch
from importlib.metadata import entry_points
from types import SimpleNamespace
from unittest.mock import MagicMock

(ours,) = [entry for entry in entry_points(group="sglang.srt.plugins") if entry.name == "tuneship"]
ours.load()()
from sglang.srt.plugins.hook_registry import HookRegistry
hooks = sorted(HookRegistry._patched)

from tuneship.serve.sglang_plugin.grammar_on_cpu import mask
logits = torch.zeros(1, 40, dtype=torch.bfloat16)
mask(None, logits, torch.tensor([[0b101, 0]], dtype=torch.int32))
open_ids = logits[0].isfinite().nonzero().flatten().tolist()

from sglang.srt.lora import lora_manager
from sglang.srt.utils import common
from tuneship.serve.sglang_plugin import memory_kept
memory_kept.install()
emptied = []
common.empty_device_cache = lambda device: emptied.append(device)
common.torch = MagicMock()
common.torch.cuda.device_count.return_value = 1
common.torch.cuda.mem_get_info.return_value = (2**30, 0)
common.torch.cuda.get_device_properties.return_value.is_integrated = False
common.torch.cuda.current_device.return_value = 0
there = lora_manager.get_available_gpu_memory("cuda", 0)
kept = len(emptied)
common.get_available_gpu_memory("cuda", 0)
memory = {"free": there, "kept": kept, "elsewhere": len(emptied)}

import asyncio
from tuneship.serve.sglang_plugin import adapters_in_use
adapters_in_use.GIVE_UP_S = 0.1

async def unload(used):
    users = {"one": SimpleNamespace(obj=SimpleNamespace(lora_path="a"))} if used else {}
    registry = SimpleNamespace(_registry={"a": SimpleNamespace(lora_id=7)}, _counters={7: "wrong for ever"})
    manager, asked = SimpleNamespace(rid_to_state=users, lora_registry=registry), SimpleNamespace(lora_name="a")

    async def locked(manager, request):
        return f"unloaded by {type(registry._counters[7]).__name__}"

    async def unlocked(manager, request, *_):
        reached.append(len(manager.rid_to_state))
        return await adapters_in_use.unload_uncounted(locked, manager, request)

    reached, said = [], []
    for way, original in ((adapters_in_use.unload_when_unused, unlocked), (adapters_in_use.unload_uncounted, locked)):
        try:
            said.append(await way(original, manager, asked))
        except TimeoutError as error:
            said.append(str(error))
    return {"reached the lock": reached, "said": said}

unloads = [asyncio.run(unload(used)) for used in (False, True)]

print(json.dumps({
    "hooks": hooks, "open": open_ids, "memory": memory, "unloads": unloads,
}))
"""


@pytest.fixture(scope="module")
def in_ours() -> dict:
    """What `IN_OURS` finds in one process that is an engine of ours: SGLang takes 10 s to import."""
    return run_python(IN_OURS, TUNESHIP_ENGINE="1")


def test_the_general_plugin_hooks_what_every_device_needs(in_ours):
    manager = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
    hooked = (
        "_discard_pending_req_states",
        "_handle_abort_req",
        "_handle_batch_output",
        "_unload_lora_adapter_locked",
        "unload_lora_adapter",
    )
    kernels = "sglang.srt.lora.backend.chunked_backend.chunked_sgmv_lora"
    assert in_ours["hooks"] == [
        f"{kernels}_expand_forward",
        f"{kernels}_shrink_forward",
        "sglang.srt.lora.lora.LoRAAdapter._build_moe_gated_map",
        "sglang.srt.lora.lora.LoRAAdapter.initialize_weights",
        "sglang.srt.lora.mem_pool.LoRAMemoryPool.load_lora_weight_to_buffer",
        *(f"{manager}.{name}" for name in hooked),
        "sglang.srt.parser.template_manager.TemplateManager.guess_chat_template_from_model_path",
        "sglang.srt.utils.hf_transformers.tokenizer.get_tokenizer",
    ]


def test_gap_a_folders_name_decides_over_a_models_own_template():
    """Fails when SGLang looks at the checkpoint first: then drop `own_template.py`."""
    source = sglang_source("parser/template_manager.py")
    loading = source.split("def load_chat_template", 1)[1].split("\n    def ", 1)[0]
    assert 0 < loading.index("guess_chat_template_from_model_path") < loading.index("_resolve_hf_chat_template")


def test_gap_a_tokenizer_without_a_length_breaks_the_answer():
    """Fails when SGLang bounds or leaves out the number: then drop `tokenizer_length.py`."""
    source = sglang_source("entrypoints/openai/serving_tokenize.py")
    assert 'max_model_len = getattr(tokenizer, "model_max_length", -1)' in source


def test_gap_the_count_of_an_adapters_requests_is_wrong_for_ever():
    """Fails when SGLang takes a request that it gives up off the count: then drop `adapters_in_use.py`."""
    source = sglang_source("managers/tokenizer_manager.py")
    given_up = source.split("def _discard_pending_req_states", 1)[1].split("\n    def ", 1)[0]
    assert "AbortReq" in given_up
    assert "lora" not in given_up


def test_an_unload_waits_for_requests_before_it_takes_the_lock(in_ours):
    unused, used = in_ours["unloads"]
    assert unused == {"reached the lock": [0], "said": ["unloaded by ConcurrentCounter"] * 2}
    still, again = used["said"]
    assert used["reached the lock"] == []
    assert "a is still used by 1 requests" in still
    assert "a is used again by 1 requests" in again


def test_what_a_load_logs_leaves_torchs_cache_alone(in_ours):
    assert in_ours["memory"] == {"free": 1.0, "kept": 0, "elsewhere": 1}


def test_upstream_still_empties_the_cache_for_a_line_of_its_log():
    """When this fails, SGLang asks for the memory with `empty_cache=False`, or not at all: drop `memory_kept.py`."""
    source = sglang_source("lora/lora_manager.py").split("def load_lora_adapter(", 1)[1].split("\n    def ", 1)[0]
    assert "get_available_gpu_memory(self.device.type, self.device.index)" in source
    assert "empty_cache=True" in sglang_source("utils/common.py").split("def get_available_gpu_memory", 1)[1][:120]


def test_upstream_still_computes_4_bit_layers_on_cuda_alone():
    """When this fails, try an NF4 base on a CPU without `four_bit_on_cpu.py`."""
    assert 'QuantState.from_dict(quant_state, device="cuda")' in sglang_source("model_loader/loader.py")
    layers = sglang_source("layers/quantization/bitsandbytes.py")
    assert "x.to(torch.bfloat16)" in layers
    assert "return torch.finfo(dtype).bits // torch.iinfo(torch.uint8).bits" in layers


def test_upstream_still_masks_with_accelerators_alone():
    """When this fails, try a JSON schema on a CPU without `grammar_on_cpu.py`."""
    source = sglang_source("constrained/xgrammar_backend.py")
    assert "pin_memory=True" in source
    assert 'raise RuntimeError(f"Unsupported device: {logits.device.type}")' in source
    assert "def apply_vocab_mask(self, logits: torch.Tensor, vocab_mask: torch.Tensor) -> None:" in source


def test_a_mask_on_a_cpu(in_ours):
    assert in_ours["open"] == [0, 2]


def test_upstream_still_refuses_packed_weights_with_tensor_parallel():
    """When this fails, `quantized.method` need not refuse it."""
    assert "Prequant BitsAndBytes models with TP is not supported" in sglang_source("model_loader/loader.py")


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
