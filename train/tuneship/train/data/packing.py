"""Several rows in one, up to `data.max_length` tokens, so that nothing is computed for padding.

Rows stay whole ("best fit decreasing") and do not see each other: position ids begin anew with each, from which the
attention mask is made, also without flash-attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trl import pack_dataset

from tuneship.train.data import store
from tuneship.train.data.store import Stored
from tuneship.train.data.template import Encoded


def pack(rows: Sequence[Encoded], max_length: int, folder: Path | None = None) -> Stored:
    """Rows of at most `max_length` tokens, each of whole `rows`; `lengths` says of which.

    They lie in a file in `folder`, or where temporary files are.
    """
    whole = store.stored(rows)

    def write(path: str) -> None:
        given = {"cache_file_name": path, "load_from_cache_file": False}
        pack_dataset(whole.learnt, seq_length=max_length, strategy="bfd", map_kwargs=given)

    return Stored.of(write, folder)
