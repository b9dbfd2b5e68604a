"""docs/hardware.md: what stands above `MARK` is written by hand, the table below is read from `bench/baselines/`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "hardware.md"
MARK = "<!-- from here on made by `make reference` -->\n"
_BASELINES = Path(__file__).parents[2] / "bench" / "baselines"
_SHOWN = ("python", "torch", "sglang", "transformers", "peft", "trl", "bitsandbytes")


def page() -> str:
    """The page: its own head, then one line a file of baselines."""
    head, mark, _ = PAGE.read_text(encoding="utf-8").partition(MARK)
    assert mark, f"{PAGE} has lost the line {MARK}"
    rows = [_row(file) for file in sorted(_BASELINES.glob("*.json"))]
    title = "## Every file of figures\n\nEach names its command, versions and hardware in full.\n"
    return f"{head}{mark}\n{title}\n| figures | GPU | CPU | versions |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"


def _row(file: Path) -> str:
    found = list(_dictionaries(json.loads(file.read_text(encoding="utf-8"))))
    machine = next((each for each in found if isinstance(each.get("cpu"), str)), {})
    # Some studies name the processor alone.
    cpu = machine.get("cpu") or next((each["hardware"] for each in found if isinstance(each.get("hardware"), str)), "-")
    cores = "" if "core" in str(cpu) or not machine else f", {machine.get('cores')} cores"
    named = [each["versions"] for each in found if isinstance(each.get("versions"), dict)]
    versions = {name: version for each in reversed(named) for name, version in each.items()}
    shown = ", ".join(f"{name} {versions[name]}" for name in _SHOWN if name in versions)
    gpu = machine.get("gpu") or "none"
    driver = f", driver {machine['driver']}" if machine.get("driver") else ""
    link = f"[{file.stem}](../bench/baselines/{file.name})"
    return f"| {link} | {gpu}{driver} | {str(cpu).strip()}{cores} | {shown or '-'} |"


def _dictionaries(node: Any) -> Iterator[dict[str, Any]]:
    """All of them, the outermost first."""
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from _dictionaries(value)
    elif isinstance(node, list):
        for value in node:
            yield from _dictionaries(value)
