"""What becomes of every tensor, from names and shapes alone; whatever is not understood is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from tuneship.core.errors import ArtifactError

pytest.importorskip("torch")

P = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BASE = {EMBEDDING: (32, 8), f"{Q}.weight": (12, 8), "model.norm.weight": (8,), HEAD: (32, 8)}
Q_PAIR = {f"{P}{Q}.lora_A.weight": (4, 8), f"{P}{Q}.lora_B.weight": (12, 4)}
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


def plan(adapter: dict[str, tuple[int, ...]], *, tied: bool = False, base: Any = None, **config: Any):
    from tuneship.train.merging.changes import Skeleton
    from tuneship.train.merging.changes import plan as make

    return make(base or BASE, adapter, CONFIG | config, Skeleton(EMBEDDING, HEAD, tied, frozenset()))


def test_what_has_a_pair_is_added_to_and_the_rest_stays():
    from tuneship.train.merging.changes import Change, Delta

    made = plan(Q_PAIR, alpha_pattern={"q_proj": 2})
    delta = Delta(f"{P}{Q}.lora_A.weight", f"{P}{Q}.lora_B.weight", 0.5)
    assert made.changes == {f"{Q}.weight": Change(f"{Q}.weight", delta)}
    assert not made.untied


def test_a_tied_head_is_made_of_the_embedding_whatever_the_checkpoint_has_under_its_name():
    from tuneship.train.merging.changes import Change

    head = {f"{P}lm_head.lora_A.weight": (4, 8), f"{P}lm_head.lora_B.weight": (32, 4)}
    for base in (BASE, {key: shape for key, shape in BASE.items() if key != HEAD}):
        made = plan(head, tied=True, base=base)
        assert made.changes[HEAD].source == EMBEDDING
        assert made.untied
    embedding = {f"{P}model.embed_tokens.lora_embedding_A": (4, 32), f"{P}model.embed_tokens.lora_embedding_B": (8, 4)}
    made = plan(embedding, tied=True)
    assert made.changes[HEAD] == Change(EMBEDDING)
    assert made.changes[EMBEDDING].delta.transposed
    assert made.untied
    assert not plan(Q_PAIR, tied=True).untied


REFUSED = {
    "nothing": ({}, {}, "no tensors"),
    "a tensor of unknown meaning": (
        Q_PAIR | {f"{P}{Q}.lora_C.weight": (4, 4)},
        {},
        rf"tensors that merging does not know: {P}{Q}.lora_C.weight",
    ),
    "the embedding saved whole, and not asked for": (Q_PAIR | {P + EMBEDDING: (32, 8)}, {}, P + EMBEDDING),
    "a name that would end a line": (Q_PAIR | {f"{P}a\nb": (4, 8)}, {}, r"does not know: base_model.model.a\\nb"),
    "half a pair": ({f"{P}{Q}.lora_A.weight": (4, 8)}, {}, rf"not whole: it lacks {P}{Q}.lora_B.weight"),
    "another half": ({f"{P}{Q}.lora_B.weight": (12, 4)}, {}, "tensors that merging does not know"),
    "another base": (
        {f"{P}{Q}.lora_A.weight": (4, 16), f"{P}{Q}.lora_B.weight": (12, 4)},
        {},
        r"does not fit: .*lora_A.weight is \(4, 16\), the base's .* of \(12, 8\) wants \(4, 8\)",
    ),
    "two ranks in a pair": (
        {f"{P}{Q}.lora_A.weight": (4, 8), f"{P}{Q}.lora_B.weight": (12, 6)},
        {},
        r"lora_B.weight is \(12, 6\)",
    ),
    "a module that the base lacks": (
        {f"{P}model.layers.9.lora_A.weight": (4, 8), f"{P}model.layers.9.lora_B.weight": (12, 4)},
        {},
        "the base has no tensor 'model.layers.9.weight'",
    ),
    "a resized vocabulary": (
        Q_PAIR | {P + EMBEDDING: (40, 8)},
        {"modules_to_save": ["embed_tokens"]},
        r"embed_tokens.weight is \(40, 8\), the base's .* wants \(32, 8\)",
    ),
    "weights the other way round": (Q_PAIR, {"fan_in_fan_out": True}, "fan_in_fan_out"),
    "what a newer PEFT knows": (Q_PAIR, {"of_next_year": True}, "of_next_year"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_understood_is_refused_by_name(what: str):
    adapter, config, says = REFUSED[what]
    with pytest.raises(ArtifactError, match=says) as caught:
        plan(adapter, **config)
    assert caught.value.hint


def test_adapters_that_keep_a_tied_head_tied_are_refused_where_there_is_one():
    assert plan(Q_PAIR, ensure_weight_tying=True).changes
    with pytest.raises(ArtifactError, match="ensure_weight_tying"):
        plan(Q_PAIR, tied=True, ensure_weight_tying=True)
