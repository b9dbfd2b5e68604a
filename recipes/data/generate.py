"""Write the example data sets: `python recipes/data/generate.py [--out FOLDER]` (standard library only, seeded).

For each task there is `<task>.train.jsonl` and `<task>.heldout.jsonl`. Held-out rows use sentence patterns and values
(names, numbers, dates, tables) that train never saw; what is a closed set by nature (labels, currencies) is shared, and
each task's module says which. A row is `{"messages": [system, user, assistant], "template": id, "values": [...]}`; rows
of `sql` also carry `schema`, the script that builds the database in which an answer is executed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import invoice_json
import sql
import triage
from common import SIZES, rows

TASKS = (invoice_json.TASK, triage.TASK, sql.TASK)


def main() -> None:
    """Write every file, byte for byte the same each time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    out: Path = parser.parse_args().out
    for task in TASKS:
        for split in SIZES:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows(task, split))
            (out / f"{task.name}.{split}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
