"""Run by the Python of llm-compressor's own environment: `python llm_compressor.py job.json`. Imports nothing of ours.

The job is {model, out, scheme, group, head, rows}: folders, fp8 or w4a16, values per scale, the head's module name, and
token ids to calibrate with.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme  # type: ignore[import-untyped]
from datasets import Dataset
from llmcompressor import oneshot  # type: ignore[import-not-found]
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier  # type: ignore[import-not-found]
from transformers import AutoModelForCausalLM


def main(job: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto")
    if job["scheme"] == "fp8":  # a scale per row of weights, and per token while it answers: nothing to calibrate
        oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=[job["head"]]))
    else:
        weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=job["group"])
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        oneshot(
            model=model,
            recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=[job["head"]]),
            dataset=Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in job["rows"]]),
            num_calibration_samples=len(job["rows"]),
            max_seq_length=max(map(len, job["rows"])),
        )
    model.save_pretrained(job["out"], save_compressed=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
