"""Parity: the verdict is one-sided, and log-probabilities are those of the model, whatever the batch."""

from __future__ import annotations

import pytest

from tuneship.core.errors import ParityError
from tuneship.train import parity
from tuneship.train.data.template import IGNORED, Encoded
from tuneship.train.merging import merge
from tuneship.train.parity import Comparison


def measured(nll: float, nll_reference: float = 1.0) -> Comparison:
    return Comparison(tokens=10, nll_base=3.0, nll_reference=nll_reference, nll=nll, kl_mean=0.1, kl_p99=0.2, merged=[])


def judge(nll: float, limit: float = 0.02):
    return parity.judge(measured(nll), 1, reference="a", candidate="b", limit=limit)


@pytest.mark.parametrize(("nll", "passed"), [(0.5, True), (1.0, True), (1.019, True), (1.021, False), (9.0, False)])
def test_a_candidate_may_be_better_without_limit_and_worse_up_to_it(nll, passed):
    assert judge(nll).passed is passed


def test_a_failed_parity_is_refused_with_its_figures_unless_forced():
    with pytest.raises(ParityError, match=r"0.5000 nats per token worse than the trained one \(limit 0.02"):
        merge.require(judge(1.5), force=False)
    forced = merge.require(judge(1.5), force=True)
    assert forced.forced
    assert not forced.passed
    assert not merge.require(judge(1.0), force=True).forced, "what passed needed no force"


def test_rows_are_chosen_until_they_hold_enough_answer_tokens():
    row = Encoded([1, 2, 3, 4], [IGNORED, IGNORED, 3, 4])
    assert len(parity.choose_rows([row] * 10, answer_tokens=5)) == 3
    assert len(parity.choose_rows([row] * 2, answer_tokens=5)) == 2


def test_log_probabilities_do_not_depend_on_padding_or_order(tiny_model):
    """Rows of unlike length, measured together, against each alone through plain transformers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    rows = [Encoded(list(range(5, 5 + n)), [IGNORED] * 2 + list(range(7, 5 + n))) for n in (9, 3, 6)]
    rows[1] = rows[1]._replace(messages=[{"role": "user", "content": "a"}])
    reference = parity.measure_reference(model, rows, pad_id=0, dtype="float32")
    assert [row.messages for row in reference] == [None, [{"role": "user", "content": "a"}], None]
    for row, known in zip(rows, reference, strict=True):
        ids = torch.tensor([row.input_ids])
        with torch.no_grad():
            log_p = model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None]).squeeze(-1)
        assert known.trained[0] == 0.0
        assert known.trained[1:] == pytest.approx(log_p.tolist(), abs=1e-4)
        assert known.base[1:] != pytest.approx(known.trained[1:], abs=1e-3), "the adapter was not switched off"
    same = parity.compare(model, {"a": model}, reference, pad_id=0)["a"]
    assert same.tokens == sum(row.loss_tokens for row in rows)
    assert same.kl_mean == pytest.approx(0, abs=1e-6)
    assert same.nll == pytest.approx(same.nll_reference)
    with model.disable_adapter():
        both = parity.compare(base, {"base": base, "again": base}, reference, pad_id=0)
    assert both["base"] == both["again"]
    assert both["base"].nll == pytest.approx(both["base"].nll_base, abs=1e-4)


def test_nll_is_the_loss_that_transformers_computes(tiny_model):
    """Over all tokens with loss of all rows together, however they were put into batches."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).train()
    rows = [
        Encoded(list(range(5, 5 + n)), [IGNORED] * (n // 2) + list(range(5 + n // 2, 5 + n))) for n in (9, 4, 400, 7)
    ]
    measured = parity.nll(model, rows, pad_id=0)
    assert not model.training
    counts = [row.loss_tokens for row in rows]
    with torch.no_grad():
        losses = [float(model(torch.tensor([r.input_ids]), labels=torch.tensor([r.labels])).loss) for r in rows]
    alone = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert measured == pytest.approx(alone, rel=1e-5)
    by_token = parity.token_log_p(model, rows, pad_id=0)
    assert [len(each) for each in by_token] == [len(row.input_ids) for row in rows]
    taught = [p for r, each in zip(rows, by_token, strict=True) for p, t in zip(each, r.labels, strict=True) if t >= 0]
    assert -sum(taught) / len(taught) == pytest.approx(measured, rel=1e-5)


def test_more_rows_than_one_batch_holds_are_all_measured(tiny_model, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    rows = [Encoded(list(range(5, 5 + n)), [IGNORED, *range(6, 5 + n)]) for n in (12, 5, 9, 30, 8)]
    together = parity.token_log_p(model, rows, pad_id=0)
    monkeypatch.setattr(parity, "_BATCH_TOKENS", 24)  # the longest has a batch of its own, over the limit
    apart = parity.token_log_p(model, rows, pad_id=0)
    for one, other in zip(together, apart, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
