"""Tasks of lm-eval-harness (the extra `eval`), asked of the server's chat endpoint by a child process.

    result = evaluate_lm_eval(target, Task("lm-eval:sums.yaml", data=""), folder, role="tuned")

`lm-eval:NAME` is a task or group that lm-eval knows, and whose data set it fetches. `lm-eval:FILE.yaml` is a task of
the user's own: relative paths in it start at its folder, and where its data are local files nothing is fetched. The
task's own generation settings hold where ours are 0. Options: `metric` (a name, or `name,filter`) and `num_fewshot`.

Only what a chat endpoint answers can be scored. A request that fails three times ends the whole evaluation. Config, log
and lm-eval's own results stay in a folder beside the items file.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tuneship.bench.quality.evaluate import Task, free_name, standard_error
from tuneship.bench.quality.lm_eval_failures import explain, explain_silent
from tuneship.bench.quality.lm_eval_results import read_outcome
from tuneship.bench.target import Target
from tuneship.core.errors import DataError, TuneshipError
from tuneship.core.files import write_atomic
from tuneship.core.process import spawn, stop_tree
from tuneship.core.progress import progress
from tuneship.core.recipe_bench import LM_EVAL_PREFIX
from tuneship.core.report import EvalResult

_CONCURRENCY = 8
_RETRIES = 3
_TIMEOUT_S = 300  # of one request
_GRACE_S = 5
_OPTIONS = {"metric", "num_fewshot"}
# Loaders of `datasets` that read files.
_LOADERS = {"json", "csv", "parquet", "text", "arrow", "xml"}
_PROGRESS = re.compile(rb"Requesting API:[^\r\n]*?(\d+)/(\d+) \[")


class _Named(NamedTuple):
    """What to ask lm-eval for."""

    name: str
    spec: str
    """What it is asked for: a name, or a file in `folder`."""
    folder: Path | None = None
    """Where relative paths start; None for what lm-eval ships."""
    offline: bool = False


def evaluate_lm_eval(
    target: Target, task: Task, folder: Path, role: Literal["base", "tuned", "other"] = "other"
) -> EvalResult:
    """Run `task` against the first of `target`'s models; writes `items-<task>-<role>.jsonl` into `folder`.

    Raises:
        TuneshipError: lm-eval is not installed, or failed.
        DataError: no such task, one without a score as ours (a mean over items in 0..1, higher is better), or no item.
        EndpointError: the server refused, vanished, or answered what is no chat completion.

    """
    if importlib.util.find_spec("lm_eval") is None:
        raise TuneshipError(f"task {task.scorer!r} needs lm-eval", hint="pip install 'tuneship[eval]'")
    named = _find(task.scorer.removeprefix(LM_EVAL_PREFIX))
    model = target.models[0]
    _check_options(task)
    label = f"lm-eval-{_plain(named.name)}"
    folder.mkdir(parents=True, exist_ok=True)
    work = _make_new(folder, f"{label}-{role}")
    (work / "config.json").write_text(json.dumps(plan_config(target, task, named.spec, work), indent=1))
    _run(target, named, work, f"eval {label} {role}")
    outcome = read_outcome(work / "out", named.name, str(task.options.get("metric", "")))
    name = free_name(folder, f"items-{label}-{role}")
    write_atomic(folder / name, "".join(json.dumps(asdict(item)) + "\n" for item in outcome.items))
    scores = [item.score for item in outcome.items]
    return EvalResult(
        task=f"{LM_EVAL_PREFIX}{named.name}",
        data=str(named.folder / named.spec) if named.folder else "",
        model=model,
        role=role,
        items=len(scores),
        score=outcome.score,
        stderr=standard_error(scores) if outcome.stderr is None else outcome.stderr,
        items_file=name,
        extra=outcome.figures,
    )


def plan_config(target: Target, task: Task, spec: str, work: Path) -> dict[str, Any]:
    """lm-eval's config file: as JSON, a model's name is taken as it is, whatever characters it has. Never the key."""
    generation: dict[str, Any] = {}
    if task.max_tokens:
        generation["max_tokens"] = task.max_tokens
    if task.temperature:
        generation |= {"temperature": task.temperature, "do_sample": True}
    config = {
        "model": "local-chat-completions",
        "model_args": {
            "model": target.models[0],
            "base_url": f"{target.api_url}/chat/completions",
            "num_concurrent": _CONCURRENCY,
            "max_retries": _RETRIES,
            "timeout": _TIMEOUT_S,
            "seed": task.seed,
        },
        "tasks": [spec],
        "apply_chat_template": True,
        "limit": task.limit,
        "seed": task.seed,
        "device": "cpu",  # the model is elsewhere
        "log_samples": True,
        "output_path": str((work / "out").resolve()),
    }
    if generation:
        config["gen_kwargs"] = generation
    if "num_fewshot" in task.options:
        config["num_fewshot"] = task.options["num_fewshot"]
    return config


def _check_options(task: Task) -> None:
    unknown = sorted(set(task.options) - _OPTIONS)
    if unknown:
        raise DataError(f"{task.scorer}: no option {unknown[0]!r}", hint=f"it has: {', '.join(sorted(_OPTIONS))}")
    fewshot = task.options.get("num_fewshot", 0)
    if not isinstance(fewshot, int) or isinstance(fewshot, bool) or fewshot < 0:
        raise DataError(f"{task.scorer}: num_fewshot = {fewshot!r} is no number of examples")
    if task.samples > 1:
        raise DataError(
            f"{task.scorer}: samples = {task.samples}, but an lm-eval task says itself how many answers an item gets",
            hint="its key is `repeats`",
        )


def _find(spec: str) -> _Named:
    """The task's name and, of a file, where it lies and whether it reads local files only."""
    if not spec.endswith((".yaml", ".yml")):
        return _Named(spec, spec)
    path = Path(spec).resolve()
    if path.suffix != ".yaml" or re.search(r"[,*?\[\]]", str(path)):
        raise DataError(f"{path}: lm-eval wants a name that ends in .yaml, without any of , * ? [ ]")
    content = _read_yaml(path)
    name = content.get("task")
    if not isinstance(name, str):
        raise DataError(f"{path} has no key 'task' with a name", hint="lm-eval's docs/task_guide.md shows the keys")
    return _Named(name, path.name, path.parent, offline=_is_local(content))


def _read_yaml(path: Path) -> Mapping[str, Any]:
    import yaml  # type: ignore[import-untyped]  # noqa: PLC0415 - comes with lm-eval

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Reads what lm-eval adds (`!function`) as nothing."""

    Loader.add_constructor("!function", lambda _loader, _node: None)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)  # noqa: S506 - a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the task {path}: {error}") from None
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not YAML: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} is no table of keys")
    return content


def _is_local(content: Mapping[str, Any]) -> bool:
    files = json.dumps((content.get("dataset_kwargs") or {}).get("data_files", ""))
    return content.get("dataset_path") in _LOADERS and "://" not in files


def _run(target: Target, named: _Named, work: Path, label: str) -> None:
    env = {
        # Empty on purpose where the server wants none: another service's key must not be sent to it.
        "OPENAI_API_KEY": target.key,
        "PYTHONSAFEPATH": "1",  # a `datasets.py` beside the task is not the library
        "PYTHONUNBUFFERED": "1",
    }
    if named.offline:
        env |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    argv = [sys.executable, "-m", "lm_eval", "run", "--config", str((work / "config.json").resolve())]
    log = work / "log"
    process = spawn(argv, env=env, stdout=subprocess.PIPE, cwd=named.folder or work)
    try:
        _follow(process, log, label)
        code = process.wait()
    finally:
        stop_tree(process, _GRACE_S)
    if code:
        raise explain(named.name, target.url, code, log)
    failure = explain_silent(named.name, target.url, log)
    if failure:
        raise failure


def _follow(process: subprocess.Popen[bytes], log: Path, label: str) -> None:
    """Its output into `log`, its progress bar to ours."""
    assert process.stdout is not None
    with process.stdout as output, log.open("wb", buffering=0) as file:
        while chunk := os.read(output.fileno(), 65536):
            file.write(chunk)
            bars = _PROGRESS.findall(chunk)
            if bars:
                progress(label, int(bars[-1][0]), int(bars[-1][1]))


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)


def _make_new(folder: Path, stem: str) -> Path:
    """`<stem>`, numbered when there is one: an earlier attempt's results must not be read as this one's."""
    number = 1
    while True:
        path = folder / (stem if number == 1 else f"{stem}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path
