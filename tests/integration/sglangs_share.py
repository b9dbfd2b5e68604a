"""What share of a card SGLang would take: `python sglangs_share.py MIB...` prints JSON. It is SGLang's own function, on
server arguments of which nothing is set that we do not set.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

from sglang.srt.model_executor.cuda_graph_config import Backend, CudaGraphConfig, PhaseConfig
from sglang.srt.server_args import ServerArgs

DEFAULTS: dict[str, Any] = {
    "chunked_prefill_size": None,
    "device": "cuda",
    "disable_cuda_graph_padding": False,
    "disaggregation_mode": "null",
    "enable_symm_mem": False,
    "language_only": False,
    "max_prefill_tokens": 16384,
    "max_total_tokens": None,
    "mem_fraction_static": None,
    "model_path": "base",
    "pp_size": 1,
    "speculative_algorithm": None,
    "tp_size": 1,
    # What it asks about the model: one of text alone, with plain attention.
    "_resolved": lambda: SimpleNamespace(enable_dp_attention=False),
    "get_model_config": lambda: SimpleNamespace(is_multimodal=False),
    "reserve_for_deepep_a2a_mb": lambda: 0.0,
    "use_mla_backend": lambda: False,
}


def share(card_mib: float) -> float:
    args = object.__new__(ServerArgs)  # its own __init__ looks for a card and a model
    graphs = CudaGraphConfig(PhaseConfig(backend=Backend.FULL), PhaseConfig(backend=Backend.BREAKABLE))
    for name, value in {**DEFAULTS, "cuda_graph_config": graphs}.items():
        object.__setattr__(args, name, value)
    args._handle_gpu_memory_settings(card_mib)
    return args.mem_fraction_static


print(json.dumps([share(float(word)) for word in sys.argv[1:]]))
