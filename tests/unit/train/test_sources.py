"""Rows of every kind of file, one by one, each with its place; what is no row is said and not raised."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from tuneship.core.errors import DataError
from tuneship.train import fetch
from tuneship.train.data import sources
from tuneship.train.data.sources import Raw

ROWS = [
    {"prompt": "h\u00f6", "completion": "ho", "more": {"a": 1}},
    {"prompt": "1", "completion": "2", "more": {"b": [None, {"c": "x"}]}},
    {"prompt": "x\ny", "completion": '"z"', "more": None},
]


def read(path: Path | str) -> list[Raw]:
    return list(sources.read(str(path)))


def good(path: Path | str) -> list:
    found = read(path)
    assert not any(raw.error for raw in found)
    return [raw.row for raw in found]


@pytest.fixture(autouse=True)
def _quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def test_jsonl(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n  \r\n{"a": 2}\r\n{\n{"a": "\xff"}\n[1]')
    assert read(file) == [
        Raw("rows.jsonl:1", {"a": 1}),
        Raw("rows.jsonl:4", {"a": 2}),
        Raw("rows.jsonl:5", None, read(file)[2].error),
        Raw("rows.jsonl:6", None, "not UTF-8"),
        Raw("rows.jsonl:7", [1]),
    ]
    assert read(file)[2].error.startswith("not JSON: ")


def test_a_file_of_no_known_ending_is_read_as_lines_of_json(tmp_path):
    (tmp_path / "rows").write_text('{"a": 1}')
    assert good(tmp_path / "rows") == [{"a": 1}]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array(tmp_path, indent):
    file = tmp_path / "rows.json"
    many = [{"number": number, "text": "x" * (number % 97)} for number in range(3000)]
    file.write_text("\ufeff\n" + json.dumps(many, indent=indent), encoding="utf-8")
    assert good(file) == many
    lines = file.read_text(encoding="utf-8").splitlines()
    assert read(file)[2999].place == f"rows.json:{2 if indent is None else len(lines) - 4}"


@pytest.mark.parametrize(
    ("text", "rows", "line"),
    [
        ("[]", [], 0),
        ("[1, 2]", [1, 2], 0),
        ('[{"a": 1},\n{"a": }]', [{"a": 1}], 2),
        ('[{"a": 1},\n{"a": 1', [{"a": 1}], 2),
        ('[{"a": 1},\n', [{"a": 1}], 2),
    ],
)
def test_an_array_that_is_cut_short_or_wrong(tmp_path, text, rows, line):
    file = tmp_path / "rows.json"
    file.write_text(text)
    found = read(file)
    assert [raw.row for raw in found if not raw.error] == rows
    bad = [(raw.place, raw.error[:9]) for raw in found if raw.error]
    assert bad == ([(f"rows.json:{line}", "not JSON:")] if line else [])


def test_a_json_file_of_lines(tmp_path):
    (tmp_path / "rows.json").write_text('{"a": 1}\n{"a": 2}\n')
    assert good(tmp_path / "rows.json") == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(("name", "between"), [("rows.csv", ","), ("rows.tsv", "\t")])
def test_csv(tmp_path, name, between):
    lines = [
        b"\xef\xbb\xbfprompt,completion",
        b'"two\nlines",ho',
        b"",
        b"one",
        b'"a"b,c',
        b"\xff,c",
        b',"he said ""no"""',
        ('"' + "x" * 200_000 + '",long').encode(),
    ]
    (tmp_path / name).write_bytes(b"\r\n".join(line.replace(b",", between.encode()) for line in lines))
    found = read(tmp_path / name)
    assert [(raw.place.partition(":")[2], raw.error.partition(":")[0]) for raw in found] == [
        ("2", ""),
        ("5", "1 fields, and the header has 2"),
        ("6", "not CSV"),
        ("7", "not UTF-8"),
        ("8", ""),
        ("9", ""),
    ]
    assert found[0].row == {"prompt": "two\nlines", "completion": "ho"}
    assert found[4].row == {"prompt": "", "completion": 'he said "no"'}
    assert len(found[5].row["prompt"]) == 200_000


def test_a_header_that_names_a_column_twice_is_no_header(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b,a\n1,2,3\n")
    assert read(tmp_path / "rows.csv") == [Raw("rows.csv:1", None, "the header has 'a' twice")]


def test_a_quote_that_is_never_closed_is_said(tmp_path):
    (tmp_path / "rows.csv").write_text('a,b\n1,2\n"3,4\n5,6\n')
    found = read(tmp_path / "rows.csv")
    assert found[0].row == {"a": "1", "b": "2"}
    assert [raw.place for raw in found if raw.error] == ["rows.csv:3"]


def test_parquet_and_arrow_and_what_datasets_saved(tmp_path):
    """Arrow gives every object the keys of all of them: those come out again without them."""
    made = datasets.Dataset.from_list(ROWS)
    made.to_parquet(tmp_path / "rows.parquet")
    made.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": made, "test": made.select([1])}).save_to_disk(tmp_path / "both")
    for source, name in (
        ("rows.parquet", "rows.parquet"),
        ("saved", "saved"),
        ("both:train", "both:train"),
        ("saved/*.arrow", "data-00000-of-00001.arrow"),
    ):
        assert good(tmp_path / source) == [*ROWS[:1], {**ROWS[1], "more": {"b": [None, {"c": "x"}]}}, ROWS[2]], source
        assert [raw.place for raw in read(tmp_path / source)] == [f"{name}:{row}" for row in (1, 2, 3)]
    assert good(tmp_path / "both:test") == [ROWS[1]]
    for wrong in ("both", "both:dev"):
        with pytest.raises(DataError, match="test, train"):
            read(tmp_path / wrong)
    with pytest.raises(DataError, match="is one split"):
        read(tmp_path / "saved:train")


def test_a_folder_as_it_lies_on_the_hub(tmp_path):
    """Splits by the names of its files, or as its card says."""
    for split, rows in (("train", ROWS), ("test", ROWS[:1])):
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / f"{split}-00000-of-00001.parquet")
    assert good(f"{tmp_path}:train") == ROWS
    assert good(f"{tmp_path}:test") == ROWS[:1]
    with pytest.raises(DataError, match=r"has the splits test, train"):
        read(tmp_path)
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: small\n  data_files: test-*\n- config_name: big\n  data_files: train-*\n---\n"
    )
    with pytest.raises(DataError, match="has the configurations "):
        read(tmp_path)


def test_rows_that_are_no_rows_of_ours_are_refused_by_name(tmp_path):
    (tmp_path / "train.txt").write_text("a\n")
    with pytest.raises(DataError, match=r"has its rows in train\.txt, which is none of \.jsonl"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.json.gz", "rows.csv.gz"])
def test_what_gzip_packed(tmp_path, name):
    text = {".jsonl": '{"a": "1"}\n', ".json": '[{"a": "1"}]', ".csv": "a\n1\n"}[Path(name[:-3]).suffix]
    packed = gzip.compress(text.encode())
    (tmp_path / name).write_bytes(packed)
    assert good(tmp_path / name) == [{"a": "1"}]
    (tmp_path / name).write_bytes(packed[:-9])
    with pytest.raises(DataError, match=f"{name} cannot be read"):
        read(tmp_path / name)


def test_a_data_set_in_the_hubs_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "datasets--owner--name" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    (snapshot / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: one.jsonl\n- config_name: two\n  data_files: two.jsonl\n---\n"
    )
    for name in ("one", "two"):
        (snapshot / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    assert good("hub:owner/name/two:train") == [{"text": "two"}]
    assert good("hub:owner/name/one") == [{"text": "one"}]


def test_without_the_hub_a_data_set_that_is_not_cached_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fetch.fetch_data(str(tmp_path))  # a path is nothing to fetch
    with pytest.raises(DataError, match="cannot fetch the data set owner/name: the hub does not answer") as caught:
        fetch.fetch_data("hub:owner/name:train")
    assert "name a file of rows" in caught.value.hint


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_a_broken_binary_file_is_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"no such thing")
    with pytest.raises(DataError, match=f"{name} cannot be read"):
        read(tmp_path / name)


def test_a_folder_of_nothing_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path)


MEMORY = """
import sys, threading, time
from pathlib import Path
import pyarrow, datasets
from tuneship.train.data import sources

def anonymous():
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0])

before = peak = anonymous()

def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)

threading.Thread(target=watch, daemon=True).start()
count = sum(1 for _ in sources.read(sys.argv[1]))
print(count, peak - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_a_file_is_never_in_memory_whole(tmp_path, kind):
    """60 MB of rows, of which a tenth may be there at once."""
    file = tmp_path / f"rows.{kind}"
    rows = [{"prompt": f"{number} " + "word " * 100, "completion": "x" * 500} for number in range(60_000)]
    if kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), file, row_group_size=1000, compression="none")
    elif kind == "csv":
        file.write_text("prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in rows))
    else:
        text = json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows))
        file.write_text(text)
    assert kind == "parquet" or file.stat().st_size > 60e6
    ran = subprocess.run([sys.executable, "-c", MEMORY, str(file)], capture_output=True, text=True, check=True)
    count, kib = map(int, ran.stdout.split())
    assert count == 60_000
    assert kib < 12 * 2**10
