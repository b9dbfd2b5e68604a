"""Scorers: what is right, what is nearly right, and what only wants to look right."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuneship.bench.quality.tasks import SCORERS, read_rows, sql
from tuneship.bench.quality.tasks.sql import has_order
from tuneship.core.errors import DataError

SCHEMA = """
create table orders (id integer primary key, customer text, total real);
insert into orders values (1, 'Ada', 10.5), (2, 'Bob', 0.1), (3, 'Ada', 0.2);
"""


@pytest.mark.parametrize(
    ("answer", "score"),
    [("billing / High", 1), ("  BILLING /\n high ", 1), ("billing/high", 0), ("billing / high.", 0), ("", 0)],
)
def test_exact(answer: str, score: float) -> None:
    assert SCORERS["exact"](answer, "billing / high", {}) == score


REFERENCE = '{"vendor": "Acme", "total": 12.5, "paid": true, "lines": [{"n": 1}], "note": null}'


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (REFERENCE, 1),
        (f"```json\n{REFERENCE}\n```", 1),
        (f"```\n{REFERENCE}\n```\nI hope this helps!", 1),
        (f"```json {REFERENCE}```", 1),
        (f"{REFERENCE}\n\nThe total is 12.5.", 1),
        (f"Here it is: {REFERENCE}", 0),
        ('{"vendor": "Acme", "total": 12.50, "paid": true, "more": 1}', 3 / 5),
        ('{"vendor": "acme", "total": "12.5", "paid": 1, "lines": [{"n": true}], "note": false}', 0),
        ('{"vendor": "Acme", "total": 12.5', 0),
        (f"[{REFERENCE}]", 0),
        ('{"total": NaN}', 0),
        ("[" * 100_000, 0),
        ("", 0),
        ("null", 0),
    ],
)
def test_json_fields(answer: str, score: float) -> None:
    assert SCORERS["json-fields"](answer, REFERENCE, {}) == pytest.approx(score)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=40)
@given(st.dictionaries(st.text(max_size=4), _JSON, min_size=1, max_size=5), st.text(max_size=20))
def test_json_fields_accepts_what_it_is_given_and_whatever_follows(fields: dict, tail: str) -> None:
    text = json.dumps(fields)
    assert SCORERS["json-fields"](f"{text}\n{tail}", text, {}) == 1


def test_json_fields_needs_a_reference_with_fields() -> None:
    for reference in ("[]", "{}", "3"):
        with pytest.raises(ValueError, match="no JSON object"):
            SCORERS["json-fields"]("{}", reference, {})


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("SELECT customer, SUM(total) FROM orders GROUP BY customer", 1),
        ("select customer, sum(total) from orders group by 1 order by 2;", 1),
        ("```sql\nselect customer, sum(total) from orders group by 1\n```", 1),
        ("-- by customer\nselect o.customer, sum(o.total) as s from orders o group by o.customer", 1),
        ("with t as (select * from orders) select customer, sum(total) from t group by 1", 1),
        ("select sum(total), customer from orders group by customer", 0),
        ("select customer, sum(total) from orders group by customer limit 1", 0),
        ("select customer, total from orders", 0),
        ("The answer is: select customer, sum(total) from orders group by 1", 0),
        ("select nonsense", 0),
        ("", 0),
        (";", 0),
    ],
)
def test_sql(answer: str, score: float) -> None:
    reference = "SELECT customer, SUM(total) FROM orders GROUP BY customer"
    assert SCORERS["sql"](answer, reference, {"schema": SCHEMA}) == score


def test_sql_order_counts_only_where_the_reference_asks_for_it() -> None:
    up, down = "select id from orders order by id", "select id from orders order by id desc"
    score = SCORERS["sql"]
    assert score(down, up, {"schema": SCHEMA}) == 0
    assert score(down, "select id from orders", {"schema": SCHEMA}) == 1
    assert score(down, "select id from (select id from orders order by id)", {"schema": SCHEMA}) == 1


def test_sql_counts_duplicates() -> None:
    assert (
        SCORERS["sql"]("select distinct customer from orders", "select customer from orders", {"schema": SCHEMA}) == 0
    )


@pytest.mark.parametrize(
    ("statement", "ordered"),
    [
        ("select a from t ORDER\n BY a", True),
        ("select a from (select a from t order by a)", False),
        ("select rank() over (partition by (b) order by a) from t", False),
        ("select 'order by' from t -- order by", False),
        ('select "order by" from t /* order by */ where a in (select (1) order by 1)', False),
        ("select a from t where b = ')' order by a", True),
    ],
)
def test_which_reference_is_ordered(statement: str, ordered: bool) -> None:
    assert has_order(statement) is ordered


@pytest.mark.parametrize(
    "attack",
    [
        "attach database '{file}' as other",
        "select 1; attach database '{file}' as other",
        "with t as (select 1) insert into orders select 9, 'Eve', 1 from t",
        "insert into orders values (9, 'Eve', 1) returning customer",
        "select writefile('{file}', 'x')",
        "select load_extension('{file}')",
        "vacuum into '{file}'",
        "pragma writable_schema = 1",
        "select * from pragma_database_list",
        "select name from pragma_table_info('orders')",
        "explain select 1",
        "values (1)",
        "delete from orders",
        "create table t (a)",
        "/**/" * 40 + "drop table orders",
        "with recursive c(x) as (select 1 union all select x + 1 from c) select x from c",
        "with recursive c(x) as (select 1 union all select x + 1 from c) select count(*) from c",
        "with recursive c(x) as (select 1 union select x + 1 from c) select x from c order by x desc",
        "select hex(zeroblob(900000000))",
        "with recursive c(x) as (select 1 union all select x + 1 from c) select group_concat(hex(zeroblob(99))) from c",
        "select 1 from " + ", ".join(f"orders o{n}" for n in range(15)) + " where o1.id + o14.id < 0",
        "select \x00 1",
        "select '\ud800'",
        "select cast(x'ff' as text)",
    ],
)
def test_sql_that_does_more_than_select_scores_nothing_and_ends(tmp_path: Path, monkeypatch, attack: str) -> None:
    monkeypatch.setattr(sql, "_TIME_LIMIT_S", 0.2)
    file = tmp_path / "file.db"
    started = time.monotonic()
    assert SCORERS["sql"](attack.replace("{file}", str(file)), "select 1", {"schema": SCHEMA}) == 0
    assert time.monotonic() - started < 5
    assert not file.exists()


@pytest.mark.parametrize(
    ("reference", "extra", "message"),
    [
        ("select missing", {"schema": SCHEMA}, "the reference does not run: no such column"),
        ("drop table orders", {"schema": SCHEMA}, "the reference does not run: not a SELECT"),
        ("select 1", {"schema": "create tabel t"}, "the schema does not run"),
        ("select 1", {}, "no key 'schema'"),
    ],
)
def test_sql_rows_that_cannot_be_scored(reference: str, extra: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SCORERS["sql"]("select 1", reference, extra)


def _row(question: str, answer: str, **extra) -> str:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages, **extra})


def test_rows(tmp_path: Path) -> None:
    lines = [
        _row("one?", "1", schema="s"),
        "",
        json.dumps(json.loads(_row("two\u2028?", "2")), ensure_ascii=False),
        _row("three?", "3"),
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    rows = read_rows(str(tmp_path / "*.jsonl"), limit=2)
    assert [(row.prompt, row.reference, row.extra) for row in rows] == [
        ([{"role": "user", "content": "one?"}], "1", {"schema": "s"}),
        ([{"role": "user", "content": "two\u2028?"}], "2", {}),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rows"),
        ("\n \n", "no rows"),
        ("{'messages': []}", r"a\.jsonl:1: not JSON"),
        ("[]", r"a\.jsonl:1"),
        ('{"messages": [{"role": "user", "content": "x"}]}', r"a\.jsonl:1: messages"),
        ('{"text": "x"}', r"a\.jsonl:1: messages: Field required"),
        (
            '{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]}',
            "the last message is from 'user'",
        ),
    ],
)
def test_files_that_are_no_task(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        read_rows(str(tmp_path / "a.jsonl"), limit=5)
    with pytest.raises(DataError, match="no data file"):
        read_rows(str(tmp_path / "b.jsonl"), limit=5)


@pytest.mark.parametrize("name", ["a.csv", "a.TSV", "a.parquet", "a.arrow", "a.jsonl.gz"])
def test_a_table_is_refused_with_where_training_writes_it_as_messages(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"prompt,completion\nPAR1\x00\xff")
    with pytest.raises(DataError, match=f"{name}: a bench reads JSONL") as caught:
        read_rows(str(tmp_path / "a*"), limit=5)
    assert "runs/NAME/stages/train/latest/heldout.jsonl" in caught.value.hint
