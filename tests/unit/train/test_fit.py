"""A step is the same step however it is cut, also when memory runs out in its middle; a lost loss ends the run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tuneship.core.errors import TrainError

torch = pytest.importorskip("torch")

from tests.unit.train import fitting  # noqa: E402 - needs torch
from tuneship.train.fitting import checkpoints, fit, pieces  # noqa: E402
from tuneship.train.fitting.faults import Watch  # noqa: E402
from tuneship.train.fitting.order import Order  # noqa: E402


def metrics(attempt: Path) -> list[dict]:
    return [json.loads(line) for line in (attempt / "metrics.jsonl").read_text().splitlines()]


def gradient(path: Path, attempt: Path, micro_batch: int, **keys) -> tuple[float, torch.Tensor]:
    """Loss and gradient of the first step, before clipping and update."""
    given = fitting.without_dropout(fitting.recipe(path, max_grad_norm=1e9, **keys))
    model, tokenizer = fitting.load(path)
    trainer = fit.build(model, tokenizer, fitting.rows(), given, fitting.plan(given, micro_batch), attempt)
    return fitting.first_step(trainer)


@pytest.fixture(scope="module")
def at_once(tiny_model, tmp_path_factory) -> tuple[float, torch.Tensor]:
    return gradient(tiny_model, tmp_path_factory.mktemp("once"), 4)


def test_four_rows_at_once_are_four_times_one(tiny_model, at_once, tmp_path):
    loss, grad = gradient(tiny_model, tmp_path, 1)
    assert loss == pytest.approx(at_once[0], abs=1e-5)
    torch.testing.assert_close(grad, at_once[1], rtol=1e-4, atol=1e-6)
    assert grad.norm() > 0.1
    # As wrong as the mean of means of rows of unequal length.
    first = list(Order(fitting.LENGTHS, 0))[:4]
    assert len({fitting.LENGTHS[i] for i in first}) == 4


class RunsOut:
    """A model whose forward has room for so many rows at a time, like a GPU's memory: for some steps more."""

    def __init__(self, model, most: int, *, from_call: int = 0) -> None:
        self.calls: list[int] = []
        self._most = most
        self._from = from_call
        model.model.layers[1].register_forward_pre_hook(self._check)

    def _check(self, _layer, args) -> None:
        self.calls.append(args[0].shape[0])
        if args[0].shape[0] > self._most and len(self.calls) > self._from:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize(("micro_batch", "most", "from_call"), [(4, 2, 0), (4, 1, 0), (2, 1, 1)])
def test_a_step_that_does_not_fit_is_done_again_in_halves(
    tiny_model, at_once, tmp_path, monkeypatch, micro_batch, most, from_call
):
    load = fitting.load

    def small(path):
        model, tokenizer = load(path)
        RunsOut(model, most, from_call=from_call)
        return model, tokenizer

    monkeypatch.setattr(fitting, "load", small)
    loss, grad = gradient(tiny_model, tmp_path, micro_batch)
    assert loss == pytest.approx(at_once[0], abs=1e-5)
    torch.testing.assert_close(grad, at_once[1], rtol=1e-4, atol=1e-6)


def test_how_a_step_was_cut_is_on_record(tiny_model, tmp_path, capsys):
    model, _ = fitting.load(tiny_model)
    out = RunsOut(model, 2, from_call=3)
    fitting.train(tiny_model, tmp_path, micro_batch=4, model=model, steps=5)
    cuts = [(line["micro_batch"], line["accumulation"]) for line in metrics(tmp_path)]
    assert cuts == [(4, 1), (4, 1), (4, 1), (2, 2), (2, 2)]
    assert out.calls == [4, 4, 4, 4, 2, 2, 2, 2]
    assert "out of memory at step 4: again with 2 rows at a time" in capsys.readouterr().err


def test_a_row_that_does_not_fit_alone_ends_the_run(tiny_model, tmp_path):
    model, _ = fitting.load(tiny_model)
    RunsOut(model, 0)
    with pytest.raises(TrainError, match="out of memory at a single row of up to 40 tokens"):
        fitting.train(tiny_model, tmp_path, micro_batch=4, model=model)


def test_pieces_lose_the_padding_they_do_not_need():
    batch = {
        "input_ids": torch.arange(12).view(3, 4),
        "labels": torch.arange(12).view(3, 4),
        "attention_mask": torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]),
    }
    cut = list(pieces.cut(batch, 2))
    assert [tuple(piece["labels"].shape) for piece in cut] == [(2, 2), (1, 4)]
    assert pieces.tokens_in(batch) == 7
    assert list(pieces.cut(batch, 0)) == [batch]


class GoesWrong:
    """A model whose last hidden state is multiplied by `factor` from some call on."""

    def __init__(self, model, factor: float, from_call: int) -> None:
        self._factor, self._left = factor, from_call
        model.model.norm.register_forward_hook(self._spoil)

    def _spoil(self, _layer, _args, output):
        self._left -= 1
        return output if self._left >= 0 else output * self._factor


def test_a_loss_that_is_no_number_ends_the_run(tiny_model, tmp_path):
    model, _ = fitting.load(tiny_model)
    GoesWrong(model, math.nan, from_call=5)
    with pytest.raises(TrainError, match=r"the loss is nan at step 6") as ended:
        fitting.train(tiny_model, tmp_path / "attempt-1", micro_batch=4, model=model, save_steps=2)
    good = checkpoints.last_of(tmp_path / "attempt-1")
    assert good.marker.step == 4
    assert f"the last good checkpoint is of step 4, {good.path};" in ended.value.hint
    assert [line["loss"] is None for line in metrics(tmp_path / "attempt-1")] == [False] * 5 + [True]


def test_a_spike_is_two_in_a_row():
    watch = Watch(3.0)
    assert not any(watch.judge(0.5 + 0.01 * i, 1.0) for i in range(16))
    assert not watch.judge(9.0, 1.0)
    assert watch.suspicious
    assert not watch.judge(0.5, 1.0)
    assert not watch.suspicious
    assert not watch.judge(3.9, 1.0)
    assert "the loss is 4.10, after 0.5" in watch.judge(4.1, 1.0)
    assert not Watch(0).judge(50.0, 1.0)
    assert Watch(0).judge(1.0, math.inf) == "the gradient's norm is inf"


def test_a_spike_ends_the_run_and_is_not_kept(tiny_model, tmp_path):
    model, _ = fitting.load(tiny_model)
    GoesWrong(model, 50.0, from_call=18)
    with pytest.raises(TrainError, match=r"the loss is \d+\.\d+, after \d\.\d+ at step 20") as ended:
        fitting.train(tiny_model, tmp_path / "attempt-1", micro_batch=4, model=model, steps=30, save_steps=1)
    good = checkpoints.last_of(tmp_path / "attempt-1")
    assert good.marker.step == 18
    assert str(good.path) in ended.value.hint


def test_order_is_by_seed_and_epoch_alone():
    order = Order(fitting.LENGTHS, seed=3)
    first = list(order)
    order.set_epoch(1)
    second = list(order)
    torch.manual_seed(99)
    order.set_epoch(0)
    assert list(order) == first != second
    assert sorted(first) == sorted(second) == list(range(len(fitting.LENGTHS)))
    assert list(Order(fitting.LENGTHS, seed=4)) != first


def test_rows_of_like_length_share_a_step():
    lengths = [1 + 37 * i % 101 for i in range(100)]
    order = list(Order(lengths, seed=0, group=4))
    assert sorted(order) == list(range(100))
    assert lengths[order[0]] == max(lengths)
    assert order != list(Order(lengths, seed=1, group=4))

    def padded(order: list[int]) -> int:
        return sum(4 * max(lengths[i] for i in order[k : k + 4]) for k in range(0, 100, 4))

    assert padded(order) < 0.75 * padded(list(Order(lengths, seed=0)))


def test_rows_come_to_the_trainer_as_arrays(tiny_model, tmp_path):
    """Lists of Python's numbers take four times as long (`bench/studies/step_waits.py`), and the device waits."""
    given = fitting.recipe(tiny_model)
    trainer = fit.build(*fitting.load(tiny_model), fitting.rows(), given, fitting.plan(given, 4), tmp_path)
    row = trainer.train_dataset[3]
    assert {name: str(values.dtype) for name, values in row.items()} == {"input_ids": "int64", "labels": "int64"}
    assert row["input_ids"].tolist() == fitting.rows()[3].input_ids
