"""What SGLang really allocates for the flags it is given: `python allocated_bytes.py --model-path ... ` prints JSON.

One engine's model runner in this process, made as SGLang's own one-batch benchmark makes it; nothing listens.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable

from sglang.srt.plugins import load_plugins

load_plugins()

import torch  # noqa: E402 - the plugins come first, as in SGLang's own processes
from sglang.benchmark.one_batch import load_model  # noqa: E402
from sglang.srt.server_args import PortArgs, prepare_server_args  # noqa: E402


def main() -> None:
    server_args = prepare_server_args(sys.argv[1:])
    server_args.check_server_args()  # reads --lora-paths
    runner = load_model(server_args, PortArgs.init_new(server_args), 0, 0)[0].torch_runner
    pool = runner.lora_manager.memory_pool if server_args.enable_lora else None
    buffers = [*pool.A_buffer.values(), *pool.B_buffer.values()] if pool else []
    adapters = runner.lora_manager.loras.values() if pool else ()
    cache = runner.token_to_kv_pool
    found = {
        "weights": size(runner.model.parameters()) + size(packing(runner.model)),
        "buffers": size(runner.model.buffers()),
        "slots": size(tensor for layers in buffers for tensor in layers),
        "kv": size([*cache.k_buffer, *cache.v_buffer]),
        "kv_tokens": runner.max_total_num_tokens,
        "adapter_host": sum(size(weights_of(adapter)) for adapter in adapters),
    }
    print(json.dumps(found))


def size(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind them, each once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def weights_of(adapter: torch.nn.Module) -> Iterable[torch.Tensor]:
    """A loaded adapter in the machine's memory."""
    return (tensor for layer in adapter.layers for tensor in layer.weights.values())


def packing(model: torch.nn.Module) -> Iterable[torch.Tensor]:
    """The scales of 4-bit weights, which are no parameters."""
    for parameter in model.parameters():
        for state in getattr(parameter, "bnb_quant_state", {}).values():
            yield from (tensor for tensor in (state.absmax, state.code, state.offset) if tensor is not None)
            if state.nested:
                yield from (state.state2.absmax, state.state2.code)


if __name__ == "__main__":
    main()
