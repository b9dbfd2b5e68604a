"""The matrices of a decoder layer, by the sizes of a model."""

from __future__ import annotations


def layer_matrices(hidden: int, keys: int, inner: int, queries: int = 0) -> dict[str, tuple[int, int]]:
    """{module: (out, in)}; there are as many `queries` as `hidden` values where nothing else is said."""
    queries = queries or hidden
    return {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
