"""The evidence of parity, as files: reference log-probabilities per held-out row, and the verdicts made from them.

Training writes the reference (base and trained), merging adds the merged model's, `verify` replays it against a server.
The measuring itself is `tuneship.train.parity`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from tuneship.core.errors import ArtifactError
from tuneship.core.files import sha256_text, write_atomic

SCHEMA = 1
REFERENCE_FILE = "reference.jsonl"
LONGEST_ROW = 1 << 26
"""Letters of a line of it: a million tokens have fewer."""


class ReferenceRow(BaseModel):
    """One held-out row, teacher-forced. All lists run over the same T tokens.

    Log-probabilities are natural, of token t given the tokens before it; the first token's is 0.0.
    """

    model_config = ConfigDict(frozen=True)

    input_ids: list[int]
    loss_mask: list[int]
    """1 where the token carries loss (the assistant's, end of turn included), else 0."""
    dtype: str
    base: list[float]
    """Under the (quantized) base, adapter off."""
    trained: list[float]
    merged: list[float] | None = None
    messages: list[dict[str, Any]] | None = None
    """The conversation that `input_ids` render; None of plain text, and in evidence from before it was kept."""
    tools: list[dict[str, Any]] | None = None
    """What was rendered beside it."""


class Parity(BaseModel):
    """`evidence/parity-<n>.json`: does `candidate` still say what `reference` says? Per answer token, in nats."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    schema_: int = Field(default=SCHEMA, alias="schema")
    reference: str
    candidate: str
    rows: int
    tokens: int
    nll_base: float
    nll_reference: float
    nll: float
    kl_mean: float
    """Mean over answer tokens of KL(reference || candidate), from full next-token distributions."""
    kl_p99: float
    limit: float
    passed: bool
    forced: bool = False
    merged_into: str = ""
    """Of a merged checkpoint: original or dequantized."""
    candidates: dict[str, float] = {}
    """{what was merged into: held-out NLL} of all that were written and measured; the kept one's is `nll`."""

    @property
    def nll_increase(self) -> float:
        """Nats per token that the candidate is worse; negative when it is better."""
        return self.nll - self.nll_reference


class Deferred(BaseModel):
    """`evidence/deferred-<n>.json`: parity was not measured where the checkpoint was merged; `verify` has to."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    schema_: int = Field(default=SCHEMA, alias="schema")
    merged_into: str
    """original or dequantized."""
    reason: str
    limit: float
    """Nats per token by which what is served may be worse than the trained model, as in a `Parity`."""


class Verification(BaseModel):
    """`evidence/verify-<n>.json`: did a server answer with this artifact? Dictionaries are {mean, high} in nats."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    schema_: int = Field(default=SCHEMA, alias="schema")
    at: str
    model: str
    version: str
    """What the server said that it answered with."""
    outcome: str
    fault: str
    message: str
    rows: int
    tokens: int
    prompts: int
    """Conversations whose rendering was compared."""
    noise_floor: dict[str, float]
    deviation: dict[str, float]
    limit: dict[str, float]
    power: float
    """How many limits away the base's answers are."""
    scale: float | None


def write_reference(folder: Path, rows: Iterable[ReferenceRow]) -> None:
    """Write `reference.jsonl` into `folder`."""
    folder.mkdir(exist_ok=True)
    write_atomic(folder / REFERENCE_FILE, "".join(row.model_dump_json() + "\n" for row in rows))


def read_reference(folder: Path) -> Iterator[ReferenceRow]:
    """The rows of `reference.jsonl` in `folder`.

    Raises:
        ArtifactError: a line of it is cut short, too long, or something else.

    """
    path = folder / REFERENCE_FILE
    with path.open(encoding="utf-8") as file:
        for number in count(1):
            try:
                line = file.readline(LONGEST_ROW + 1)
                if len(line) > LONGEST_ROW:
                    raise ValueError
                row = ReferenceRow.model_validate_json(line) if line else None
            except ValueError:
                raise ArtifactError(
                    f"{path}:{number} is not a reference row",
                    hint="restore it from a copy, or `tuneship up RECIPE --from train`",
                ) from None
            if row is None:
                return
            yield row


def rows_sha256(folder: Path) -> str:
    """Hex SHA-256 over which tokens `reference.jsonl` asks about, whatever any model said; empty without that file.

    Raises:
        ArtifactError: as `read_reference`.

    """
    if not (folder / REFERENCE_FILE).is_file():
        return ""
    return sha256_text(json.dumps([[row.input_ids, row.loss_mask] for row in read_reference(folder)]))
