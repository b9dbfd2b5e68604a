"""The recipe's values: what is refused, by which name, and that every default is valid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomli_w

from tuneship.core import recipe_file
from tuneship.core.errors import ExitCode, RecipeError
from tuneship.core.recipe import Recipe

REPOSITORY = Path(__file__).parents[3]
SHIPPED = sorted((REPOSITORY / "recipes").glob("*.toml"))

NOT_YET: dict[str, Any] = {
    "train.strategy": ["ddp", "fsdp2"],
}


def tree(key: str = "", value: Any = None) -> dict[str, Any]:
    """The smallest recipe, with one value at a dotted key."""
    root: dict[str, Any] = {"model": {"id": "org/base"}, "data": {"train": "train.jsonl"}}
    if key:
        *parents, last = key.split(".")
        here = root
        for part in parents:
            here = here.setdefault(part, {})
        here[last] = value
    return root


def full(**sections: dict[str, Any]) -> dict[str, Any]:
    """A recipe of full training, with more in some sections."""
    train = {"method": "full"} | sections.pop("train", {})
    return tree("train", train) | {"quantization": {"method": "none"}} | sections


def _written(tmp_path: Path, content: dict[str, Any]) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(content))
    return path


def refused(tmp_path: Path, content: dict[str, Any]) -> RecipeError:
    path = _written(tmp_path, content)
    with pytest.raises(RecipeError) as caught:
        recipe_file.load(path)
    assert str(path) in caught.value.message
    assert caught.value.exit_code == ExitCode.USAGE
    return caught.value


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in NOT_YET.items() for value in values], ids=lambda v: str(v)[:20]
)
def test_a_value_whose_work_comes_later_is_refused_by_name(tmp_path: Path, key: str, value: Any):
    error = refused(tmp_path, tree(key, value))
    assert "is not yet supported" in error.message
    assert key.rpartition(".")[2] in error.message


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("train.packing", True, "packing"),
        ("train.compile", True, "compile"),
        ("train.optimizer", "paged_adamw", "optimizer = 'paged_adamw'"),
        ("train.save_steps", 5, "save_steps"),
        ("lora.dora", True, "lora.dora"),
        ("lora.alpha_pattern", {"q_proj": 4.0}, "lora.alpha_pattern"),
        ("quantization.method", "fp4", "quantization.method = 'fp4'"),
    ],
)
def test_what_unsloth_does_not_do_is_refused_by_name(tmp_path: Path, key: str, value: Any, named: str):
    content = tree(key, value)
    content.setdefault("train", {})["backend"] = "unsloth"
    assert f"backend = 'unsloth' does not go with {named}" in refused(tmp_path, content).message


def test_the_compiler_does_not_go_with_ligers_kernels(tmp_path: Path):
    content = tree("train.compile", True)
    content["train"]["liger"] = True
    assert "compile = true does not go with liger = true" in refused(tmp_path, content).message


def test_what_was_not_packed_has_no_dequantized_base(tmp_path: Path):
    content = tree("merge.base", "dequantized")
    assert recipe_file.load(_written(tmp_path, content)).merge.base == "dequantized"
    error = refused(tmp_path, content | {"train": {"method": "lora"}, "quantization": {"method": "none"}})
    assert "merge.base = 'dequantized' needs quantization.method = 'nf4'" in error.message


@pytest.mark.parametrize(
    ("beyond", "why"),
    [
        ({"serve": {"mode": "merged", "quantization": "dequantized"}}, "needs serve.mode = 'adapters'"),
        ({"train": {"method": "lora"}, "quantization": {"method": "none"}}, "'none' trains on others"),
        ({"quantization": {"method": "fp4"}}, "'fp4' trains on others"),
        ({"serve": {"mode": "auto", "quantization": "dequantized"}}, "mode = 'auto' chooses the quantization"),
        ({"merge": {"quantize": "fp8"}}, "needs serve.quantization = 'none', not 'dequantized'"),
    ],
    ids=["merged", "16 bits", "fp4", "auto", "quantized twice"],
)
def test_dequantized_is_for_adapters_that_saw_nf4(tmp_path: Path, beyond: dict[str, Any], why: str):
    content = tree() | {"serve": {"mode": "adapters", "quantization": "dequantized"}}
    assert recipe_file.load(_written(tmp_path, content)).serve.quantization == "dequantized"
    assert why in refused(tmp_path, content | beyond).message


@pytest.mark.parametrize("task", ["exact", "rouge-l", "python:mine.py:score"])
def test_tasks_that_a_recipe_may_name(task: str):
    content = tree() | {"bench": {"eval": [{"task": task, "data": "x"}]}}
    assert Recipe.model_validate(content).bench.eval[0].task == task


@pytest.mark.parametrize("task", ["lm-eval:gsm8k", "lm-eval:tasks/mine.yaml"])
def test_lm_eval_tasks_bring_their_own_data_and_lengths(task: str):
    content = tree() | {"bench": {"eval": [{"task": task, "options": {"metric": "exact_match", "num_fewshot": 5}}]}}
    found = Recipe.model_validate(content).bench.eval[0]
    assert (found.task, found.data, found.max_tokens) == (task, "", 0)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"task": "lm-eval:"}, "names no task"),
        ({"task": "lm-eval:gsm8k", "data": "x"}, "data = 'x', but task = 'lm-eval:gsm8k' names its own"),
        ({"task": "lm-eval:gsm8k", "samples": 4, "temperature": 1}, "has its own number"),
        ({"task": "exact"}, "task = 'exact' needs data"),
    ],
)
def test_what_a_task_cannot_have_is_refused(tmp_path: Path, task: dict[str, Any], message: str):
    assert message in refused(tmp_path, tree() | {"bench": {"eval": [task]}}).message


def test_a_task_that_is_no_scorer_is_refused_with_those_that_are(tmp_path: Path):
    content = tree() | {"bench": {"eval": [{"task": "exactly", "data": "x"}]}}
    assert "'exactly' is none of: exact, normalised" in refused(tmp_path, content).message


def test_samples_without_a_temperature_are_refused(tmp_path: Path):
    content = tree() | {"bench": {"eval": [{"task": "exact", "data": "x", "samples": 4}]}}
    assert "needs a temperature above 0" in refused(tmp_path, content).message


@pytest.mark.parametrize(
    ("load", "message"),
    [
        ({"prefix_tokens": 64, "input_tokens": 64}, "prefix_tokens = 64 is not below input_tokens = 64"),
        ({"workload": "shared-prefix"}, "workload = 'shared-prefix' needs prefix_tokens"),
    ],
)
def test_a_shared_prefix_needs_room(tmp_path: Path, load: dict[str, Any], message: str):
    assert message in refused(tmp_path, tree() | {"bench": {"load": load}}).message


def test_the_list_above_names_every_value_that_the_code_refuses():
    sections = {name: field.annotation for name, field in Recipe.model_fields.items()}
    sections["bench.load"] = sections["bench"].model_fields["load"].annotation
    in_code = {
        (f"{name}.{key}", str(value))
        for name, section in sections.items()
        for key, values in getattr(section, "not_yet", {}).items()
        for value in values
    }
    listed = {(key, str(value)) for key, values in NOT_YET.items() for value in values}
    assert in_code - listed == set()


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (tree("train.method", "lora"), ("train.method", "quantization.method")),
        (tree("quantization.method", "none"), ("train.method", "quantization.method")),
        (tree("train.micro_batch", 5), ("micro_batch", "effective_batch")),
        (tree("serve.mode", "adapters") | {"lora": {"rank": 128}}, ("lora.rank", "serve.max_rank")),
        (tree("serve.quantization", "nf4"), ("serve.quantization", "serve.mode")),
        (tree("serve.mode", "auto") | {"serve": {"mode": "auto", "quantization": "nf4"}}, ("quantization", "mode")),
        (
            tree("serve.mode", "adapters") | {"lora": {"target_modules": ["q_proj", "lm_head"]}},
            ("lm_head", "serve.mode"),
        ),
        (tree("serve.mode", "adapters") | {"lora": {"dora": True}}, ("lora.dora", "serve.mode")),
        (
            tree("serve", {"mode": "adapters", "quantization": "nf4"}) | {"quantization": {"method": "fp4"}},
            ("serve.quantization", "quantization.method"),
        ),
        (full(serve={"mode": "adapters"}), ("serve.mode", "train.method")),
        (full(merge={"quantize": "fp8"}), ("merge.quantize", "train.method")),
        (full(train={"kernels": "fused"}), ("train.kernels", "train.method")),
        (full(train={"backend": "unsloth"}), ("train.backend", "quantization.method")),
        (tree("train.patience", 3), ("train.patience", "train.eval_steps")),
        (tree("train.eval_steps", 10), ("train.eval_steps", "data.heldout")),
        (tree("train.packing", "wrapped"), ("packing = 'wrapped'", "packing = 'bfd'")),
        (tree("train", {"packing": True, "group_by_length": True}), ("group_by_length", "packing")),
        (
            tree("data.columns", {"prompt": "q", "output": "a"}),
            ("prompt, output", "prompt-completion: prompt, completion"),
        ),
    ],
)
def test_contradictions_name_both_fields(tmp_path: Path, content: dict[str, Any], names: tuple[str, str]):
    message = refused(tmp_path, content).message
    assert all(name in message for name in names)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("train.micro_batch", "many", "input should be 'auto' or a valid integer"),
        ("train.micro_batch", 0, "input should be 'auto' or greater than or equal to 1"),
        ("bench.load.rates", "swep", "input should be 'sweep' or a valid list"),
        ("bench.load.rates", [1, -1], "'bench.load.rates.1' = -1: input should be greater than 0"),
        ("train.learning_rate", float("inf"), "finite"),
        ("train.learning_rate", float("nan"), "finite"),
        ("train.learning_rate", -1.0, "greater than 0"),
        ("lora.dropout", 1.0, "less than 1"),
        ("serve.port", 65536, "65535"),
        ("serve.memory_fraction", 1.5, "'auto' or less than 1"),
        ("data.max_length", 3, "16"),
        ("name", "a/b", "match pattern"),
        ("model", 3, "valid table"),
    ],
)
def test_a_wrong_value_is_refused_with_its_key_and_reason(tmp_path: Path, key: str, value: Any, says: str):
    message = refused(tmp_path, tree(key, value)).message
    assert key in message
    assert says in message


@pytest.mark.parametrize("key", ["model.id", "data.train"])
def test_a_missing_key_is_named(tmp_path: Path, key: str):
    content = tree()
    del content[key.split(".", maxsplit=1)[0]][key.split(".")[1]]
    error = refused(tmp_path, content)
    assert f"{key!r} is missing" in error.message
    assert "model.id and data.train" in error.hint


def test_w4a16_says_what_can_be_served(tmp_path: Path):
    message = refused(tmp_path, tree("serve.quantization", "w4a16")).message
    assert "compressed-tensors" in message
    assert "quantization = 'none'" in message


def test_a_recipe_is_frozen():
    recipe = Recipe.model_validate(tree())
    with pytest.raises(ValueError, match="frozen"):
        recipe.lora.rank = 8  # type: ignore[misc]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_recipes_load_and_their_data_is_there(path: Path):
    recipe = recipe_file.load(path)
    patterns = [recipe.data.train, recipe.data.heldout, *(task.data for task in recipe.bench.eval)]
    for pattern in patterns:
        assert recipe_file.data_files(pattern)


def test_shipped_recipes_have_names_of_their_own():
    names = [recipe_file.load(path).name for path in SHIPPED]
    assert len(set(names)) == len(names) >= 4


def test_a_task_of_a_table_is_refused_unless_it_is_what_is_held_out(tmp_path: Path):
    content = tree("data.heldout", "rows.csv") | {"bench": {"eval": [{"task": "exact", "data": "rows.csv"}]}}
    assert recipe_file.load(_written(tmp_path, content)).bench.eval[0].data == str(tmp_path / "rows.csv")
    content["bench"]["eval"][0]["data"] = "other.csv"
    assert "bench.eval.data = 'other.csv': a JSONL of messages" in refused(tmp_path, content).message


def test_a_template_is_kept_as_its_text(tmp_path: Path):
    """A run is what the template was when it began, and where that file lies changes nothing."""
    for folder, text in (("a", "{{ one }}"), ("b", "{{ one }}"), ("c", "{{ two }}")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "chat.jinja").write_text(text)
    loaded = [
        recipe_file.load(_written(tmp_path, tree("data.template", f"{folder}/chat.jinja"))).data for folder in "abc"
    ]
    assert loaded[0] == loaded[1] != loaded[2]
    (tmp_path / "again").mkdir()
    assert recipe_file.load(_written(tmp_path / "again", tree("data.template", loaded[2].template))).data.template == (
        "{{ two }}"
    )
    assert "no file at" in refused_anyhow(tmp_path, tree("data.template", "nowhere.jinja")).message


def refused_anyhow(tmp_path: Path, content: dict[str, Any]) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        recipe_file.load(_written(tmp_path, content))
    return caught.value
