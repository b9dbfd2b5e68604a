"""Several rows in one, up to `data.max_length` tokens, so that nothing is computed for padding.

Rows stay whole ("best fit decreasing") and do not see each other: position ids begin anew with each, from which the
attention mask is made, also without flash-attention.
"""

from __future__ import annotations

from collections.abc import Sequence

import datasets
from trl import pack_dataset

from tuneship.train.data.template import Encoded


def pack(rows: Sequence[Encoded], max_length: int) -> list[Encoded]:
    """Rows of at most `max_length` tokens, each of whole `rows`; `lengths` says of which."""
    columns = {"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]}
    packed = pack_dataset(datasets.Dataset.from_dict(columns), seq_length=max_length, strategy="bfd")
    return [Encoded(row["input_ids"], row["labels"], lengths=tuple(row["seq_lengths"])) for row in packed]


def example(row: Encoded) -> dict[str, list[int]]:
    """As TRL's collator takes it."""
    columns = {"input_ids": row.input_ids, "labels": row.labels}
    return columns | ({"seq_lengths": list(row.lengths)} if row.lengths else {})
