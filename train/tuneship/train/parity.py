"""Is it still the model that was trained? Teacher-forced log-probabilities of held-out rows, per answer token.

The reference is measured once, when training ends: log p of every token under the quantized base and under the trained
model. A candidate (a merged checkpoint) is measured beside the trained model, so that KL uses full distributions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from peft import PeftModel
from torch import Tensor

from tuneship.core.parity import Parity, ReferenceRow
from tuneship.core.progress import progress
from tuneship.train.data.template import IGNORED, Encoded

Name = TypeVar("Name", bound=str)

ANSWER_TOKENS = 5_000
"""Enough for a mean NLL to be known to about 0.01 nats."""
_BATCH_TOKENS = 2_048
_BATCH_LOGITS = 1 << 26
"""Values of one batch's logits, which a large vocabulary reaches first: 256 MB, some 8 times at once in `compare`."""


class Comparison(NamedTuple):
    """Over N answer tokens: the candidate's mean NLL and its divergence from the trained model, in nats."""

    tokens: int
    nll_base: float
    nll_reference: float
    nll: float
    kl_mean: float
    kl_p99: float
    merged: list[list[float]]
    """Per row, log p of every token under the candidate."""


def choose_rows(rows: Sequence[Encoded], answer_tokens: int = ANSWER_TOKENS) -> list[Encoded]:
    """The first rows that together hold at least `answer_tokens` tokens with loss (all rows if they hold fewer)."""
    chosen, total = [], 0
    for row in rows:
        chosen.append(row)
        total += row.loss_tokens
        if total >= answer_tokens:
            break
    return chosen


@torch.inference_mode()
def measure_reference(model: PeftModel, rows: Sequence[Encoded], pad_id: int, dtype: str) -> list[ReferenceRow]:
    """Log-probabilities of `rows` under the base (adapter off) and under the trained model."""
    model.eval()
    by_model: dict[str, dict[int, list[float]]] = {"base": {}, "trained": {}}
    done = 0
    for indices, batch in _batches(rows, pad_id, model):
        for name, context in (("base", model.disable_adapter()), ("trained", nullcontext())):
            with context:
                log_p = _token_log_p(_log_softmax(model, batch), batch["input_ids"])
            for position, index in enumerate(indices):
                by_model[name][index] = log_p[position, : len(rows[index].input_ids)].tolist()
        done += len(indices)
        progress("reference", done, len(rows))
    return [
        ReferenceRow(
            input_ids=row.input_ids,
            loss_mask=row.loss_mask,
            dtype=dtype,
            base=by_model["base"][index],
            trained=by_model["trained"][index],
            messages=list(row.messages) or None,
            tools=row.tools,
        )
        for index, row in enumerate(rows)
    ]


@torch.inference_mode()
def token_log_p(model: Any, rows: Sequence[Encoded], pad_id: int) -> list[list[float]]:
    """Per row, log p of every token; the model is left in eval mode."""
    model.eval()
    found: dict[int, list[float]] = {}
    for indices, batch in _batches(rows, pad_id, model):
        log_p = _token_log_p(_log_softmax(model, batch), batch["input_ids"])
        found |= {index: log_p[at, : len(rows[index].input_ids)].tolist() for at, index in enumerate(indices)}
    return [found[index] for index in range(len(rows))]


@torch.inference_mode()
def nll(model: Any, rows: Sequence[Encoded], pad_id: int) -> float:
    """Mean over all tokens of `rows` that carry loss, in nats; the model is left in eval mode."""
    model.eval()
    total = 0.0
    for _, batch in _batches(rows, pad_id, model):
        log_p = _token_log_p(_log_softmax(model, batch), batch["input_ids"])[:, 1:]
        total -= float(log_p[batch["labels"][:, 1:] != IGNORED].double().sum())
    return total / sum(label != IGNORED for row in rows for label in row.labels[1:])


@torch.inference_mode()
def compare(
    trained: Any, candidates: Mapping[Name, Any], reference: Sequence[ReferenceRow], pad_id: int
) -> dict[Name, Comparison]:
    """Measure each of `candidates` against `trained` on the reference's rows; all of them are in memory together."""
    rows = [
        Encoded(r.input_ids, [t if m else IGNORED for t, m in zip(r.input_ids, r.loss_mask, strict=True)])
        for r in reference
    ]
    tallies = {name: _Tally() for name in candidates}
    done = 0
    for indices, batch in _batches(rows, pad_id, trained):
        p = _log_softmax(trained, batch)
        for name, candidate in candidates.items():
            tallies[name].add(p, _log_softmax(candidate, batch), batch, {i: len(rows[i].input_ids) for i in indices})
        done += len(indices)
        progress("parity", done, len(rows))
    base = [b for r in reference for b, m in zip(r.base, r.loss_mask, strict=True) if m]
    return {name: tally.comparison(-sum(base) / len(base)) for name, tally in tallies.items()}


class _Tally:
    """One candidate's figures over all batches."""

    def __init__(self) -> None:
        self._nll: list[Tensor] = []
        self._nll_reference: list[Tensor] = []
        self._kl: list[Tensor] = []
        self._merged: dict[int, list[float]] = {}

    def add(self, p: Tensor, q: Tensor, batch: dict[str, Tensor], lengths: dict[int, int]) -> None:
        """`p` and `q` are log-softmax of the trained model and the candidate; `lengths` are {row's index: tokens}."""
        log_p, log_q = (_token_log_p(x, batch["input_ids"]) for x in (p, q))
        answers = (batch["labels"] != IGNORED)[:, 1:]
        self._nll.append(-log_q[:, 1:][answers])
        self._nll_reference.append(-log_p[:, 1:][answers])
        p, q = p[:, :-1][answers], q[:, :-1][answers]
        self._kl.append((p.exp() * (p - q)).sum(-1))
        for (index, length), row in zip(lengths.items(), log_q, strict=True):
            self._merged[index] = row[:length].tolist()

    def comparison(self, nll_base: float) -> Comparison:
        divergence = torch.cat(self._kl).double()
        return Comparison(
            tokens=divergence.numel(),
            nll_base=nll_base,
            nll_reference=float(torch.cat(self._nll_reference).double().mean()),
            nll=float(torch.cat(self._nll).double().mean()),
            kl_mean=float(divergence.mean()),
            kl_p99=float(divergence.quantile(0.99)),
            merged=[self._merged[index] for index in range(len(self._merged))],
        )


def judge(measured: Comparison, rows: int, *, reference: str, candidate: str, limit: float) -> Parity:
    """The verdict: the candidate may be better without limit, and worse by at most `limit` nats per token."""
    return Parity(
        reference=reference,
        candidate=candidate,
        rows=rows,
        tokens=measured.tokens,
        nll_base=measured.nll_base,
        nll_reference=measured.nll_reference,
        nll=measured.nll,
        kl_mean=measured.kl_mean,
        kl_p99=measured.kl_p99,
        limit=limit,
        passed=measured.nll - measured.nll_reference <= limit,
    )


def workspace_bytes(reference: Sequence[ReferenceRow], vocabulary: int) -> int:
    """What `compare` needs beside the weights."""
    longest = max(len(row.input_ids) for row in reference)
    return 8 * 4 * max(_BATCH_LOGITS, longest * vocabulary)


def _log_softmax(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """[rows, T, vocabulary] in float32."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    return torch.log_softmax(logits.float(), dim=-1)


def _token_log_p(log_softmax: Tensor, input_ids: Tensor) -> Tensor:
    """[rows, T]: log p of each token given those before it; 0 for the first."""
    following = log_softmax[:, :-1].gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    return torch.cat([torch.zeros_like(following[:, :1]), following], dim=1)


def _batches(rows: Sequence[Encoded], pad_id: int, model: Any) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Rows of like length together, right-padded, on `model`'s device; no more tokens than the two limits allow."""
    device, vocabulary = model.device, model.get_output_embeddings().weight.shape[0]
    most = min(_BATCH_TOKENS, _BATCH_LOGITS // vocabulary)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids))
    chunk: list[int] = []
    for index in order:
        longest = len(rows[index].input_ids)
        if chunk and (len(chunk) + 1) * longest > most:
            yield chunk, _collate([rows[i] for i in chunk], pad_id, device)
            chunk = []
        chunk.append(index)
    if chunk:
        yield chunk, _collate([rows[i] for i in chunk], pad_id, device)


def _collate(rows: Sequence[Encoded], pad_id: int, device: torch.device) -> dict[str, Tensor]:
    longest = max(len(row.input_ids) for row in rows)

    def padded(values: Callable[[Encoded], list[int]], fill: int) -> Tensor:
        return torch.tensor([values(r) + [fill] * (longest - len(r.input_ids)) for r in rows], device=device)

    return {
        "input_ids": padded(lambda r: r.input_ids, pad_id),
        "labels": padded(lambda r: r.labels, IGNORED),
        "attention_mask": padded(lambda r: [1] * len(r.input_ids), 0),
    }
