"""What merging takes: `merge_peak.py BASE ADAPTER OUT original|dequantized` prints {peak_bytes, merge_s} as JSON.

The peak is of this process's resident pages, those of mapped files with them; memory on a GPU is not counted.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer

from tuneship.core.recipe import Model
from tuneship.train.merging.merge import Trained, write_merged


def main() -> None:
    base, adapter, out = map(Path, sys.argv[1:4])
    tokenizer = AutoTokenizer.from_pretrained(base)
    trained = Trained(base, adapter, "nf4", torch.bfloat16, double=True)
    began = time.perf_counter()
    write_merged(trained, sys.argv[4], tokenizer, (2,), Model(id="made", dtype="bfloat16"), out)
    merge_s = round(time.perf_counter() - began, 1)
    status = Path("/proc/self/status").read_text()
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) * 1024
    print(json.dumps({"peak_bytes": peak, "merge_s": merge_s}))


if __name__ == "__main__":
    main()
