"""Tables of prompts: every kind of file gives the same rows, and what is no table is refused
rather than read as prompts."""

import csv
import datetime
import json
from decimal import Decimal

import datasets
import fakes
import numpy as np
import pytest
import torch

from tokenenv.errors import InvalidArgument, MissingDependency
from tokenenv.prompts import load_prompts
from tokenenv.tables import by_name, plain_value, read_columns, read_rows

ROWS = [
    {"prompt": 'two and "two",\nis', "answer": "4", "level": "easy"},
    {"prompt": "the\u2028cat", "answer": "", "level": "no,ne"},
]
CSV = 'answer,prompt,level\r\n4,"two and ""two"",\nis",easy\r\n\r\n,the\u2028cat,"no,ne"\r\n'


def write(path, text):
    path.write_bytes(text.encode())
    return path


def parquet(path):
    datasets.Dataset.from_list(ROWS).to_parquet(str(path))
    return path


SOURCES = {
    "list": lambda folder: ROWS,
    "dataset": lambda folder: datasets.Dataset.from_list(ROWS),
    "streamed": lambda folder: datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
    "jsonl": lambda folder: write(folder / "p.jsonl", "\n\n".join(map(json.dumps, ROWS))),
    "ndjson": lambda folder: str(write(folder / "p.NDJSON", "\n".join(map(json.dumps, ROWS)))),
    "json": lambda folder: write(folder / "p.json", "\ufeff\n" + json.dumps(ROWS, indent=2)),
    "json lines": lambda folder: write(folder / "p.json", "\n".join(map(json.dumps, ROWS))),
    "csv": lambda folder: write(folder / "p.csv", "\ufeff" + CSV),
    "CSV": lambda folder: write(folder / "p.CSV", CSV),
    "tsv": lambda folder: write(
        folder / "p.tsv",
        'prompt\tanswer\tlevel\n"two and ""two"",\nis"\t4\teasy\nthe\u2028cat\t\tno,ne\n',
    ),
    "parquet": lambda folder: parquet(folder / "p.parquet"),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_of_table_gives_its_prompts_and_their_other_columns(kind, tmp_path):
    rows = read_rows(SOURCES[kind](tmp_path))
    assert [row.prompt for row in rows] == [row["prompt"] for row in ROWS]
    assert [row.columns for row in rows] == [
        {name: row[name] for name in ("answer", "level")} for row in ROWS
    ]
    assert by_name([row.columns for row in rows])["answer"] == ["4", ""]


def test_a_table_is_no_list_of_prompts():
    """The header and the answers of a .csv were prompts."""
    tokenizer = fakes.tokenizer(["the", "cat", "rain"])
    rows = [{"question": "the cat", "answer": "rain"}]
    options = {"vocab_size": fakes.VOCAB_SIZE, "column": "question"}
    assert load_prompts(rows, tokenizer, **options) == [tokenizer("the cat")["input_ids"]]
    read = read_rows(rows, "question")
    assert load_prompts(read, tokenizer, vocab_size=fakes.VOCAB_SIZE) == [
        tokenizer("the cat")["input_ids"]
    ]


def test_prompts_alone_have_no_columns(tmp_path):
    for source in (["a", [3, 4]], write(tmp_path / "p.text", "a\nb"), write(tmp_path / "p", "a\n")):
        assert not any(row.columns for row in read_rows(source))
    array = write(tmp_path / "p.json", '["a", {"prompt": "b", "answer": 1}, [5, 6]]')
    assert [(row.prompt, row.columns) for row in read_rows(array)] == [
        ("a", {}),
        ("b", {"answer": 1}),
        ([5, 6], {}),
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "p.csv",
            "question,answer\na,b\n",
            r"p\.csv:2 holds no 'prompt'; name .* question, answer",
        ),
        ("p.csv", "prompt;answer\na;b\n", r"holds no 'prompt'.* It holds prompt;answer"),
        ("p.csv", "prompt,answer\na,b,c\n", r"p\.csv:2 ends a row of 3 values; .* names 2 columns"),
        ("p.csv", "prompt,answer\n\nb\n", r"p\.csv:3 ends a row of 1 values"),
        ("p.csv", "prompt,a,a\nx,1,2\n", r"p\.csv:1 names a column twice: prompt, a, a"),
        ("p.csv", 'prompt\n"open', r"p\.csv:2 cannot be read: unexpected end of data"),
        ("p.csv", "prompt\n", r"p\.csv' holds no prompts"),
        ("p.csv", "", r"p\.csv' holds no prompts"),
        ("p.json", "[]", r"p\.json' holds no prompts"),
        ("p.json", '[{"prompt": "a"}', r"p\.json is not JSON .*; it begins as an array of rows"),
        ("p.json", '[{"text": "a"}]', r"p\.json\[0\] holds no 'prompt'"),
        ("p.json", '{\n"prompt": "a"}', r"p\.json:1 is not JSON .*; each line holds one value"),
        ("p.parquet", "PAR1 but not really", r"p\.parquet' is no Parquet file: "),
        ("p.xlsx", "prompt\n", r"ends in '\.xlsx'; allowed: \.jsonl, .*\.parquet, \.txt, \.text"),
        (
            "p.yaml",
            "prompt: a\n",
            r"ends in '\.yaml'; allowed: .* one prompt a line is a \.txt file",
        ),
    ],
)
def test_what_is_no_table_is_named_with_its_place(name, text, message, tmp_path):
    with pytest.raises(InvalidArgument, match=message):
        read_rows(write(tmp_path / name, text))


def test_a_csv_may_begin_with_an_empty_line_and_hold_a_long_document(tmp_path):
    limit, document = csv.field_size_limit(), "a word, " * 30_000
    for text in (f'\n\nprompt,answer\n"{document}",4\n', f'prompt,answer\n"{document}",4\n'):
        [row] = read_rows(write(tmp_path / "p.csv", text))
        assert (row.prompt, row.columns) == (document, {"answer": "4"})
    assert csv.field_size_limit() == limit


def test_parquet_without_pyarrow_names_the_line_that_installs_it(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingDependency, match=r"needs pyarrow: pip install pyarrow$"):
        read_rows(write(tmp_path / "p.parquet", "PAR1"))


def test_columns_are_plain_data():
    given = {
        "numbers": [np.int64(3), np.float32(0.5), True, 2**70],
        "arrays": (np.arange(2), torch.ones(1)),
        "missing": [None, float("nan"), np.float64("inf")],
        "dates": {"day": datetime.date(2026, 1, 2), "price": Decimal("1.50")},
    }
    plain = plain_value(given, "here")
    assert plain == {
        "numbers": [3, 0.5, True, 2**70],
        "arrays": [[0, 1], [1.0]],
        "missing": [None, None, None],
        "dates": {"day": "2026-01-02", "price": "1.50"},
    }
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert type(plain["numbers"][0]) is int
    for bad, kind in ((b"bytes", "bytes"), ({1: 2}, "dict"), (object(), "object"), ([{2}], "set")):
        with pytest.raises(InvalidArgument, match=f"here is of type {kind}; a column holds text"):
            plain_value(bad, "here")
    deep = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(InvalidArgument, match="nested too deeply"):
        plain_value(deep, "here")
    with pytest.raises(InvalidArgument, match=r"prompts\[0\]: 'picture' is of type object"):
        read_rows([{"prompt": "a", "picture": object()}])


def test_given_columns_are_read_where_they_are_wanted():
    columns = {"answer": [1, object(), 3], "level": np.array(["a", "b", "c"])}
    assert read_columns(columns, [0, 2], 3, "columns") == [
        {"answer": 1, "level": "a"},
        {"answer": 3, "level": "c"},
    ]
    assert read_columns(None, [0, 1], 2, "columns") == [{}, {}]
