"""Recipes on disk: overrides, hints, absolute paths, and that the resolved copy says the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from tuneship.core import recipe_file
from tuneship.core.errors import DataError, RecipeError
from tuneship.core.recipe import Recipe

Write = Callable[..., Path]


def test_no_recipe(tmp_path: Path):
    with pytest.raises(RecipeError, match="no recipe at") as caught:
        recipe_file.load(tmp_path / "absent.toml")
    assert "quickstart" in caught.value.hint


@pytest.mark.parametrize("text", ["name = invoice", "[lora", "rank = 1\nrank = 2"])
def test_not_toml(tmp_path: Path, text: str):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match="not valid TOML"):
        recipe_file.load(path)


def test_not_text(tmp_path: Path):
    path = tmp_path / "recipe.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot read"):
        recipe_file.load(path)


@pytest.mark.parametrize(
    ("text", "key", "hint"),
    [
        ("[lora]\nrnk = 8", "lora.rnk", "'lora.rank'"),
        ("[lora]\neffective_batch = 8", "lora.effective_batch", "'train.effective_batch'"),
        ("[bench.load]\nduration = 8", "bench.load.duration", "'bench.load.duration_s'"),
        ("[[bench.eval]]\ntask = 'sql'\ndata = 'x'\nlimits = 5", "bench.eval.0.limits", "'bench.eval.0.limit'"),
        ("[trian]\nsteps = 5", "trian", "'train'"),
        ("[merge]\nzzz = 5", "merge.zzz", "base, max_nll_increase"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(write_recipe: Write, text: str, key: str, hint: str):
    with pytest.raises(RecipeError) as caught:
        recipe_file.load(write_recipe(text))
    assert f"unknown key {key!r}" in caught.value.message
    assert hint in caught.value.hint


def test_further_complaints_are_counted(write_recipe: Write):
    with pytest.raises(RecipeError) as caught:
        recipe_file.load(write_recipe("[lora]\nrnk = 8\n[train]\nstpes = 3\nmicro_batch = 'x'"))
    assert "2 more after this one" in caught.value.hint


def test_overrides_are_read_as_toml_or_as_text(write_recipe: Write):
    overrides = {
        "lora.rank": "8",
        "train.learning_rate": "1e-3",
        "train.micro_batch": "4",
        "quantization.double": "false",
        "bench.load.rates": "[2, 3]",
        "model.revision": "v1.0",
        "name": "other-name",
    }
    recipe = recipe_file.load(write_recipe(), overrides)
    assert recipe.lora.rank == 8
    assert recipe.train.learning_rate == 1e-3
    assert recipe.train.micro_batch == 4
    assert recipe.quantization.double is False
    assert recipe.bench.load.rates == (2.0, 3.0)
    assert recipe.model.revision == "v1.0"
    assert recipe.name == "other-name"


def test_a_recipe_without_a_name_is_called_as_its_file(write_recipe: Write):
    file = write_recipe()
    assert "name =" not in file.read_text()
    mine = file.rename(file.with_name("My dates (2).toml"))
    assert recipe_file.load(mine).name == "My-dates-2"
    assert recipe_file.load(mine, {"name": "other"}).name == "other"
    assert recipe_file.load(mine.rename(mine.with_name("_.toml"))).name == "run"


def test_an_override_reaches_into_a_list(write_recipe: Write):
    two = "[[bench.eval]]\ntask = 'sql'\ndata = 'a'\n[[bench.eval]]\ntask = 'exact'\ndata = 'b'"
    recipe = recipe_file.load(write_recipe(two), {"bench.eval.1.limit": "7"})
    assert [task.limit for task in recipe.bench.eval] == [200, 7]


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("bench.eval.1.limit", "1 is not an index into 1 entries"),
        ("bench.eval.last.limit", "last is not an index"),
        ("name.first", "name is a value, not a table"),
        ("lora.rnk", "unknown key 'lora.rnk'"),
    ],
)
def test_a_wrong_override_is_refused(write_recipe: Write, key: str, says: str):
    path = write_recipe("[[bench.eval]]\ntask = 'sql'\ndata = 'a'")
    path.write_text('name = "x"\n' + path.read_text())
    with pytest.raises(RecipeError, match=says):
        recipe_file.load(path, {key: "1"})


def test_paths_are_relative_to_the_recipe(tmp_path: Path, write_recipe: Write, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    path = write_recipe(
        "heldout = '../held.jsonl'\n[[bench.eval]]\ntask = 'sql'\ndata = 'rows.jsonl'", model="id = 'models/mine'"
    )
    monkeypatch.chdir(tmp_path / "elsewhere")
    recipe = recipe_file.load(Path("..") / path.name)
    assert recipe.data.train == str(tmp_path / "train.jsonl")
    assert recipe.data.heldout == str(tmp_path.parent / "held.jsonl")
    assert recipe.bench.eval[0].data == str(tmp_path / "rows.jsonl")
    assert recipe.model.id == str(tmp_path / "models" / "mine")


@pytest.mark.parametrize("model_id", ["bundled:smollm2-135m-instruct", "org/base"])
def test_ids_that_are_no_folder_stay_as_they_are(write_recipe: Write, model_id: str):
    assert recipe_file.load(write_recipe(model=f"id = '{model_id}'")).model.id == model_id


def test_data_files_of_a_pattern_are_sorted(tmp_path: Path):
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in recipe_file.data_files(f"{tmp_path}/*.jsonl")] == ["a.jsonl", "b.jsonl"]
    with pytest.raises(DataError, match="no data file at"):
        recipe_file.data_files(f"{tmp_path}/*.csv")


def test_a_digest_covers_what_it_names(write_recipe: Write):
    path = write_recipe()
    one, two = recipe_file.load(path), recipe_file.load(path, {"serve.port": "1"})
    assert recipe_file.digest(one, "lora", "train") == recipe_file.digest(two, "train", "lora")
    assert recipe_file.digest(one, "serve") != recipe_file.digest(two, "serve")
    assert recipe_file.digest(one) != recipe_file.digest(two)


TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20)
POSITIVE = st.floats(min_value=0, exclude_min=True, max_value=1e6, allow_subnormal=False)
SHARE = st.floats(min_value=0.001, max_value=0.999)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    micro = draw(st.just("auto") | st.integers(1, 8))
    task = st.fixed_dictionaries(
        {"task": st.sampled_from(["exact", "json-fields", "sql"]), "data": st.just("/d/x.jsonl")},
        optional={"limit": st.integers(1, 10**6)},
    )
    return Recipe.model_validate(
        {
            "name": draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", fullmatch=True)),
            "model": {"id": "hub:" + draw(TEXT).replace("\0", ""), "revision": draw(TEXT)},
            "data": {"train": "/d/train.jsonl", "loss": draw(st.sampled_from(["assistant", "completion", "all"]))},
            "lora": {
                "alpha": draw(POSITIVE),
                "target_modules": draw(st.just("all-linear") | st.lists(TEXT, min_size=1, max_size=3)),
            },
            "train": {
                "micro_batch": micro,
                "effective_batch": 8 if micro == "auto" else 3 * micro,
                "learning_rate": draw(POSITIVE),
                "checkpointing": draw(st.just("auto") | st.booleans()),
                "seed": draw(st.integers(-(2**62), 2**62)),
            },
            "serve": {"memory_fraction": draw(st.just("auto") | SHARE), "extra_args": draw(st.lists(TEXT, max_size=3))},
            "bench": {
                "load": {"rates": draw(st.lists(POSITIVE, min_size=1, max_size=4))},
                "eval": draw(st.lists(task, max_size=2)),
            },
        }
    )


@given(recipe=recipes())
@settings(max_examples=100, deadline=None)
def test_the_resolved_copy_loads_to_the_same_recipe(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe):
    path = tmp_path_factory.getbasetemp() / "resolved.toml"
    recipe_file.save(recipe, path)
    assert recipe_file.load(path) == recipe


def test_the_resolved_copy_spells_out_every_key(write_recipe: Write):
    text = recipe_file.dump(recipe_file.load(write_recipe()))
    for section in ("model", "quantization", "data", "lora", "train", "merge", "serve", "bench.load", "bench.gate"):
        assert f"[{section}]" in text
    assert "max_nll_increase = 0.02" in text


def test_bench_paths_are_relative_to_the_recipe_too(tmp_path: Path):
    bench = {
        "load": {"trace": "t.jsonl", "workload": "chats.jsonl"},
        "eval": [
            {"task": "python:mine.py:score", "data": "rows.jsonl"},
            {"task": "exact", "data": "rows.jsonl"},
            {"task": "json-schema", "data": "rows.jsonl", "options": {"schema": "schemas/invoice.json"}},
            {"task": "json-schema", "data": "rows.jsonl", "options": {"schema": ' {"type": "object"}'}},
            {"task": "regex", "data": "rows.jsonl", "options": {"pattern": "a/b"}},
        ],
        "gate": {"baseline": "old/report.json"},
    }
    file = tmp_path / "recipe.toml"
    file.write_text(tomli_w.dumps({"model": {"id": "org/base"}, "data": {"train": "a.jsonl"}, "bench": bench}))
    found = recipe_file.load(file).bench
    assert found.load.trace == str(tmp_path / "t.jsonl")
    assert found.load.workload == str(tmp_path / "chats.jsonl")
    assert [task.task for task in found.eval[:2]] == [f"python:{tmp_path / 'mine.py'}:score", "exact"]
    assert {task.data for task in found.eval} == {str(tmp_path / "rows.jsonl")}
    assert [task.options for task in found.eval[2:]] == [
        {"schema": str(tmp_path / "schemas/invoice.json")},
        {"schema": ' {"type": "object"}'},
        {"pattern": "a/b"},
    ]
    assert found.gate.baseline == str(tmp_path / "old/report.json")


def test_every_file_that_measuring_reads(tmp_path: Path):
    bench = {
        "load": {"trace": "t.jsonl", "workload": "chats.jsonl"},
        "eval": [
            {"task": "python:mine.py:score", "data": "rows.jsonl"},
            {"task": "json-schema", "data": "invoices.jsonl", "options": {"schema": "invoice.json"}},
            {"task": "json-schema", "data": "more.jsonl", "options": {"schema": '{"type": "object"}'}},
        ],
    }
    file = tmp_path / "recipe.toml"
    data = {"train": "a.jsonl", "heldout": "held.jsonl"}
    file.write_text(tomli_w.dumps({"model": {"id": "org/base"}, "data": data, "bench": bench}))
    names = ["t.jsonl", "chats.jsonl", "rows.jsonl", "mine.py", "invoices.jsonl", "invoice.json", "more.jsonl"]
    assert recipe_file.bench_files(recipe_file.load(file)) == [str(tmp_path / name) for name in names]
    heldout = recipe_file.load(file, {"bench.load.workload": "heldout", "bench.load.trace": "", "bench.eval": "[]"})
    assert recipe_file.bench_files(heldout) == [str(tmp_path / "held.jsonl")]
    fixed = recipe_file.load(file, {"bench.load.workload": "fixed", "bench.load.trace": "", "bench.eval": "[]"})
    assert recipe_file.bench_files(fixed) == []


def test_a_named_workload_is_no_path(tmp_path: Path):
    file = tmp_path / "recipe.toml"
    bench = {"load": {"workload": "heldout"}}
    file.write_text(tomli_w.dumps({"model": {"id": "org/base"}, "data": {"train": "a.jsonl"}, "bench": bench}))
    assert recipe_file.load(file).bench.load.workload == "heldout"


def test_a_task_file_of_lm_eval_is_relative_to_the_recipe_and_read_with_what_lies_beside_it(tmp_path: Path):
    tasks = [{"task": "lm-eval:tasks/mine.yaml"}, {"task": "lm-eval:gsm8k"}]
    tree = {"model": {"id": "m"}, "data": {"train": "t.jsonl"}, "bench": {"eval": tasks}}
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(tree))
    (tmp_path / "tasks").mkdir()
    for name in ("mine.yaml", "rows.json"):
        (tmp_path / "tasks" / name).touch()
    found = recipe_file.load(tmp_path / "recipe.toml")
    assert [task.task for task in found.bench.eval] == [f"lm-eval:{tmp_path}/tasks/mine.yaml", "lm-eval:gsm8k"]
    read = {path for pattern in recipe_file.bench_files(found) for path in recipe_file.data_files(pattern)}
    assert read == {tmp_path / "tasks/mine.yaml", tmp_path / "tasks/rows.json"}
