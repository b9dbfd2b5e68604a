"""Rows in one pack are trained as if they were alone."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuneship.core.recipe import Recipe

torch = pytest.importorskip("torch")

from tests.unit.train import fitting  # noqa: E402 - needs torch
from tuneship.train.data import packing  # noqa: E402
from tuneship.train.data.template import Encoded  # noqa: E402
from tuneship.train.fitting import fit, pieces  # noqa: E402

MAX_LENGTH = 48


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, MAX_LENGTH), min_size=1, max_size=30))
def test_every_row_is_in_one_pack_whole(lengths):
    rows = [Encoded([7 + i] * length, [7 + i] * length) for i, length in enumerate(lengths)]
    packs = packing.pack(rows, MAX_LENGTH)
    found = []
    for pack in packs:
        assert len(pack.input_ids) == len(pack.labels) == sum(pack.lengths) <= MAX_LENGTH
        at = 0
        for length in pack.lengths:
            found.append(pack.input_ids[at : at + length])
            at += length
    assert sorted(found) == sorted(row.input_ids for row in rows)


def gradient(path, attempt, rows, effective, **keys):
    given = fitting.without_dropout(fitting.recipe(path, max_grad_norm=1e9, effective_batch=effective, **keys))
    model, tokenizer = fitting.load(path)
    cut = fitting.plan(given, effective, len(rows))
    trainer = fit.build(
        model, tokenizer, rows, given, cut, attempt, **({"at_most": 1} if keys.get("packing") == "bfd" else {})
    )
    return fitting.first_step(trainer)


# true: a whole batch of packs at once; "bfd" here: cut into single rows again, as when memory runs out.
@pytest.mark.parametrize("packs", [True, "bfd"])
def test_packed_rows_have_the_loss_and_gradient_of_separate_ones(tiny_model, tmp_path, packs):
    rows = fitting.rows()
    packed = packing.pack(rows, MAX_LENGTH)
    assert len(packed) < len(rows)
    assert any(len(pack.lengths) > 1 for pack in packed)
    loss, grad = gradient(tiny_model, tmp_path / "packed", packed, len(packed), packing=packs)
    apart, expected = gradient(tiny_model, tmp_path / "apart", rows, len(rows))
    assert loss == pytest.approx(apart, abs=1e-5)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)


def test_a_packed_batch_is_cut_at_its_rows():
    ids = torch.arange(1, 10)[None]
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3]])}
    cut = list(pieces.cut(batch, 2))
    assert [piece["input_ids"].tolist() for piece in cut] == [[[1, 2, 3, 4, 5]], [[6, 7, 8, 9]]]
    assert pieces.rows_in(batch) == 3
    assert pieces.tokens_in(batch) == 9


@pytest.mark.parametrize(
    ("train", "complaint"),
    [
        ({"packing": "wrapped"}, "cuts rows and lets them see each other"),
        ({"packing": True, "group_by_length": True}, "nothing to group"),
    ],
)
def test_what_would_mix_rows_is_refused(train, complaint):
    with pytest.raises(ValueError, match=complaint):
        Recipe.model_validate({"model": {"id": "m"}, "data": {"train": "t"}, "train": train})


def test_it_trains(tiny_model, tmp_path):
    given = fitting.recipe(tiny_model, packing=True, effective_batch=2, steps=6)
    model, tokenizer = fitting.load(tiny_model)
    packed = packing.pack(fitting.rows(), MAX_LENGTH)
    cut = fitting.plan(given, 2, len(packed))
    from tuneship.train.fitting.checkpoints import Identity

    fit.fit(model, tokenizer, packed, given, cut, tmp_path, Identity.of(given, {}))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
