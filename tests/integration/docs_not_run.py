"""What no test runs of the pages' commands, each with the reason; tests fail where one names what no page holds."""

from __future__ import annotations

from collections.abc import Mapping

_NETWORK = "needs a network, and gigabytes from it"
_CONTAINERS = "needs an engine for containers; bench/studies/images.py runs it on one"
_STUDY = "a study: hours, or a GPU; what it found lies in bench/baselines"

NOT_RUN: Mapping[str, str] = {
    "make setup": "makes the environment that the walk runs in; whoever runs the tests has run it",
    ". .venv/bin/activate": "the walk has tuneship in its PATH already",
    "tuneship fetch Qwen/Qwen2.5-1.5B-Instruct": _NETWORK,
    "tuneship up recipes/qwen2.5-1.5b-12gb.toml": f"{_NETWORK}, and a GPU",
    "tuneship bench eval http://127.0.0.1:30000 --model triage --task lm-eval:gsm8k": (
        f"{_NETWORK}; tests/integration/test_lm_eval.py runs it on a task of its own"
    ),
}
"""Commands of the pages that are walked, as they are printed."""

NEEDS_GPU: Mapping[str, str] = {
    "tuneship bench train recipes/triage.toml --ways copied-recipe tuneship --steps 4": "needs a GPU",
}
"""Walked with `--gpu`."""

OPTIONS: Mapping[str, str] = {
    "--help": "tests/unit/core/test_start.py",
    "adapters": "a group, not a command",
    "bench": "a group, not a command",
    "bench train": f"needs a GPU: {next(iter(NEEDS_GPU))}",
    "bench train --KEY": "needs a GPU",
    "bench eval --task lm-eval": "tests/integration/test_lm_eval.py runs it on a task of its own, without a network",
    "docker": "a group, not a command",
    "docker build": _CONTAINERS,
    "docker run": _CONTAINERS,
    "docker run --port": _CONTAINERS,
    "fetch": f"{_NETWORK}; of the bundled model every `up` does it",
    "keys add --admin": "tests/unit/serve/test_keys.py",
    "serve --dtype": "tests/integration/test_deploy.py",
    "serve --extra-arg": "tests/integration/test_serve_faults.py",
    "serve --quantization dequantized": "tests/integration/test_verify.py",
    "serve --quantization fp8": "needs a GPU; bench/studies/support_matrix.py runs it on one",
    "up --from bench": "as --from merge, which tests/integration/test_train_merge.py runs",
    "up --from merge": "tests/integration/test_train_merge.py",
    "up --from train": "as --from merge, which tests/integration/test_train_merge.py runs",
    "up --run": "tests/integration/test_train_merge.py",
    "up --until bench": "the default, which the walk runs",
    "up --until serve": "serves as `up --keep-serving` does, without the bench before it",
    "up --until train": "what `train` is, which the walk runs",
}
"""Of all other pages: a verb, or a verb with one option (and its choice)."""

OTHERS: Mapping[str, str] = {
    r"make (setup|quickstart|test|lint)$": "`.ci/run` runs the others; the walk runs the quickstart's own command",
    r"make (test-latest|coverage|images|lock)$": "minutes to hours, for those who change tuneship",
    r"make (reference|licences)$": "tests/unit/shipping/test_documents.py",
    r"\S*pytest tests/unit": "this is one of them",
    r"\S*python bench/studies/": _STUDY,
    r"\. \.venv/bin/activate$": "the tests run in that environment",
    r"(uv venv|python3 -m venv) .* requirements\.lock": "a second environment of 9 GB",
    r"uv pip install --target light ": "tests/unit/shipping/test_wheel.py does it",
    r"pip install": "a placeholder, or a package of its own; tests/unit/shipping/test_wheel.py installs extras' names",
    r"docker (context|compose|exec)\b": _CONTAINERS,
    r"export TUNESHIP_": "for `docker`, below it",
    r"hf auth login$": _NETWORK,
    r"python tests/integration/docs_walk\.py$": "it is the walk",
}
"""Of all other pages: commands of other programs, as regular expressions."""
