"""Rows lie on disk: memory does not grow with their number, and nothing is left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tuneship.train.data.store import Stored, store
from tuneship.train.data.template import IGNORED, Encoded

CONVERSATION = [
    {"role": "user", "content": "h\u00f6"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": None}}}]},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
ROWS = [
    Encoded([1, 2, 3], [IGNORED, 2, 3], CONVERSATION, tools=TOOLS),
    Encoded([4], [4]),
    Encoded([5, 6], [IGNORED, IGNORED], CONVERSATION),
]

PROGRAM = """
import sys, threading, time
from pathlib import Path
from transformers import AutoTokenizer
from tuneship.core.recipe import Data
from tuneship.train.data import dataset, packing
from tuneship.train.data.template import ChatTemplate
from tuneship.train.fitting.order import Order

model, rows, folder = sys.argv[1:]
peak = 0

def watch():
    global peak
    while True:
        status = Path("/proc/self/status").read_text()
        peak = max(peak, int(status.partition("RssAnon:")[2].split()[0]))
        time.sleep(0.005)

template = ChatTemplate(AutoTokenizer.from_pretrained(model))
threading.Thread(target=watch, daemon=True).start()
found = dataset.load(rows, Data(train=rows), template, Path(folder))
learnt = packing.pack(found.rows, 512, Path(folder))
for index in Order(learnt.lengths, 0):
    learnt.learnt[index]
for index in Order(found.rows.lengths, 0):
    found.rows[index]
print(peak, found.tokens)
"""


def test_rows_come_back_as_they_were(tmp_path):
    kept = store(ROWS, tmp_path)
    assert list(kept) == ROWS
    assert kept[-1] == ROWS[-1]
    assert kept[1:] == ROWS[1:]
    assert kept.lengths.tolist() == [3, 1, 2]
    assert kept.loss_tokens.tolist() == [2, 1, 0]
    assert not list(tmp_path.iterdir())


def test_chosen_rows_have_their_own_figures():
    chosen = store(ROWS).select([2, 0])
    assert list(chosen) == [ROWS[2], ROWS[0]]
    assert (chosen.lengths.tolist(), chosen.loss_tokens.tolist()) == ([2, 3], [0, 2])


def test_many_batches_are_one_sequence():
    kept = store(Encoded([n] * (n % 7 + 1), [n] * (n % 7 + 1)) for n in range(2500))
    assert len(kept) == 2500
    assert kept[2499].input_ids == [2499]
    assert np.array_equal(kept.lengths, np.arange(2500) % 7 + 1)
    assert np.array_equal(kept.loss_tokens, kept.lengths)


def test_none_are_none():
    assert len(store([])) == 0


def test_what_fails_while_it_is_written_leaves_nothing(tmp_path):
    def broken():
        yield ROWS[0]
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        store(broken(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_trainer_gets_what_is_learnt_alone():
    assert store(ROWS).learnt[0] == {"input_ids": [1, 2, 3], "labels": [IGNORED, 2, 3]}
    assert isinstance(store(ROWS), Stored)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_rows(tiny_model, tmp_path):
    """Reading, packing and taking every row once; the peak of memory that is no file's. In lists: 4 KB a row."""
    few, many = (_peak(tiny_model, tmp_path, count) for count in (2_000, 12_000))
    assert many - few < 8 * 2**10


def _peak(model: Path, folder: Path, count: int) -> int:
    """KiB."""
    line = {"prompt": "how much is the invoice of the first month", "completion": "it is forty two"}
    file = folder / f"{count}.jsonl"
    with file.open("w") as lines:
        for number in range(count):
            lines.write(json.dumps(line | {"prompt": f"{number} {line['prompt']}"}) + "\n")
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(model), str(file), str(folder)], capture_output=True, text=True, check=True
    )
    peak, tokens = map(int, ran.stdout.split())
    assert tokens > 20 * count
    return peak
