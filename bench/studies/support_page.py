"""The rows of the support matrix as data, and the page that is made of them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Agreement(_Record):
    """One model's greedy answers beside those of transformers + PEFT on the same weights."""

    prompts: int
    equal: int
    tokens: int
    tokens_before_first_difference: int


class Row(_Record):
    """One format on one machine. `measured` is by the study; `earlier` by hand before it, from `source`."""

    format: str
    loads: bool
    how: Literal["measured", "earlier"] = "measured"
    refused: str = ""
    base: Agreement | None = None
    adapters: dict[str, Agreement] = {}
    adapters_apart: bool | None = None
    """Whether base and adapters mostly say something else, each of them."""
    lora: bool | None = None
    """Of an earlier measurement, which has no answers to count: whether LoRA was served."""
    cuda_graphs: bool | None = None
    memory_bytes: int | None = None
    weights_gib: float | None = None
    """By SGLang's own account."""
    tokens_per_s: float | None = None
    command: str = ""
    study: str = ""
    source: str = ""
    note: str = ""
    date: str = ""

    @property
    def lora_works(self) -> bool | None:
        """Adapters answer, otherwise than the base; None where nobody has tried."""
        return self.adapters_apart if self.adapters else self.lora


class Machine(_Record):
    """One `bench/baselines/support-*.json`."""

    machine: dict[str, str | int]
    versions: dict[str, str]
    model: str
    rows: list[Row]

    @property
    def device(self) -> str:
        """The accelerator, or the processor."""
        gpu = str(self.machine["gpu"])
        return gpu if gpu != "none" else f"CPU, {self.machine['cores']} cores"

    def with_row(self, row: Row) -> Machine:
        """The same with `row` in the place of the one of its format."""
        return self.model_copy(update={"rows": [*(r for r in self.rows if r.format != row.format), row]})


EXPECTED_ON_A_GPU = ("bf16", "nf4", "fp8", "w4a16")
_HEAD = """# Which bases are served

Made by `bench/studies/support_matrix.py --render` from `bench/baselines/support-*.json`; not written by hand. A row is
a real server with two adapters, asked greedily beside transformers + PEFT on the same weights. Parity counts whole
answers (of up to 16 tokens) that are equal, of base / adapters, then the tokens before the first difference. In 16 bits
two implementations round differently, and one rounding can turn a greedy answer: float32 is where equality is expected.
FP8 is made while SGLang loads, and held against the 16-bit weights, which have other values.
Weights are by SGLang's own account. Memory is of the server's processes: on a GPU what they hold of it, KV cache and
reserve included, which is a share of the card and not of the format; on a CPU their PSS.
"""


def render(machines: list[Machine]) -> str:
    """The whole page."""
    parts = [_HEAD, *(_section(machine) for machine in machines)]
    missing = _not_run(machines)
    if missing:
        parts.append(missing)
    return "\n".join(parts)


def _section(machine: Machine) -> str:
    named = ", ".join(f"{name} {machine.versions[name]}" for name in ("sglang", "torch", "transformers", "peft",
                      "bitsandbytes", "compressed-tensors") if name in machine.versions)  # fmt: skip
    lines = [
        f"## {machine.device}",
        "",
        f"{machine.model}; {named}.",
        "",
        "| format | loads | LoRA works | greedy parity | CUDA graphs | weights | memory | tokens/s | date |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_line(row) for row in machine.rows),
        "",
        *(f"- {text}" for row in machine.rows for text in _remarks(row)),
        "",
    ]
    return "\n".join(lines)


def _line(row: Row) -> str:
    memory = f"{row.memory_bytes / 2**30:.1f} GiB" if row.memory_bytes else "-"
    cells = [
        row.format + (" (earlier)" if row.how == "earlier" else ""),
        "yes" if row.loads else "refused",
        _word(row.lora_works),
        _parity(row),
        _word(row.cuda_graphs),
        f"{row.weights_gib:.2f} GiB" if row.weights_gib else "-",
        memory,
        f"{row.tokens_per_s:,.1f}" if row.tokens_per_s else "-",
        row.date or "-",
    ]
    return f"| {' | '.join(cells)} |"


def _word(answer: bool | None) -> str:
    return {True: "yes", False: "no", None: "-"}[answer]


def _parity(row: Row) -> str:
    if row.base is None:
        return "-"
    found = list(row.adapters.values())
    equal, prompts = sum(a.equal for a in found), sum(a.prompts for a in found)
    all_of_them = [row.base, *found]
    same, tokens = (sum(getattr(a, key) for a in all_of_them) for key in ("tokens_before_first_difference", "tokens"))
    adapters = f" / {equal} of {prompts}" if prompts else ""
    return f"{row.base.equal} of {row.base.prompts}{adapters}; {same} of {tokens} tokens"


def _remarks(row: Row) -> list[str]:
    found = []
    if row.refused:
        found.append(f"{row.format}: {row.refused}")
    if row.note:
        found.append(f"{row.format}: {row.note}")
    if row.source:
        found.append(f"{row.format}: measured before this study: {row.source}; the cells with a dash are not run yet")
    if row.study:
        found.append(f"{row.format}: `{row.command}`, by `{row.study}`")
    return found


def _not_run(machines: list[Machine]) -> str:
    """What no GPU has been asked by the study."""
    measured = {
        row.format for machine in machines if machine.machine["gpu"] != "none" for row in machine.rows
        if row.how == "measured"
    }  # fmt: skip
    waiting = [name for name in EXPECTED_ON_A_GPU if name not in measured]
    if not waiting:
        return ""
    return (
        f"## Not run yet\n\nOn a GPU, by the study: {', '.join(waiting)}. One command fills them in:\n\n"
        f"    .venv/bin/python bench/studies/support_matrix.py --formats {','.join(waiting)} --render\n"
    )
