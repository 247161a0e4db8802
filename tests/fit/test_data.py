"""Data of people's own: every file, folder and dataset gives the same examples, and every column of
the field is read."""

import csv
import json

import datasets
import fakes
import numpy as np
import pytest

from tokenenv.fit.data import read_examples
from tokenenv.fit.examples import Skipped

TOKENIZER = fakes.tokenizer()
IDS = {word: TOKENIZER(word)["input_ids"][0] for word in fakes.WORDS}
PAIRS = [
    {"prompt": "the cat", "chosen": "is good", "rejected": "is bad"},
    {"prompt": "a dog", "chosen": "was warm", "rejected": "was"},
]


def ids(text):
    """The ids of words, and of the end of the text for a full stop."""
    return [fakes.EOS if word == "." else IDS[word] for word in text.split()]


def read(rows, kind="ranking", skipped=None, tokenizer=TOKENIZER, **options):
    skipped = Skipped() if skipped is None else skipped
    options = {"vocab_size": fakes.VOCAB_SIZE, **options}
    return read_examples(rows, kind, tokenizer, skipped=skipped, **options)


def spelled(examples):
    """The ids of prompts and responses, without the places."""
    return [[(t.prompt.tolist(), t.response.tolist()) for t in e.texts] for e in examples]


def texts(examples):
    """Prompts and responses as words, and scores."""
    found = [
        [" ".join(map(TOKENIZER.decode, map(list, (t.prompt, t.response)))) for t in e.texts]
        for e in examples
    ]
    return [(one, e.scores) for one, e in zip(found, examples, strict=True)]


# ---------------------------------------------------------------- sources


def jsonl(path, rows):
    path.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def separated(path, rows, delimiter):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        for row in rows:
            cells = {k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()}
            writer.writerow(cells)
    return path


def json_array(path, rows):
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


def parquet(path, rows):
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    return path


def folder(path, rows):
    path.mkdir()
    jsonl(path / "data.jsonl", rows)
    return path


SOURCES = {
    "list": lambda path, rows: rows,
    "jsonl": lambda path, rows: jsonl(path / "d.jsonl", rows),
    "json": lambda path, rows: json_array(path / "d.json", rows),
    "csv": lambda path, rows: separated(path / "d.csv", rows, ","),
    "tsv": lambda path, rows: separated(path / "d.TSV", rows, "\t"),
    "parquet": lambda path, rows: parquet(path / "d.parquet", rows),
    "dataset": lambda path, rows: datasets.Dataset.from_list(rows),
    "streamed": lambda path, rows: datasets.Dataset.from_list(rows).to_iterable_dataset(),
    "generated": lambda path, rows: datasets.IterableDataset.from_generator(lambda: iter(rows)),
    "folder": lambda path, rows: folder(path / "data", rows),
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same_examples(source, tmp_path):
    pairs = read(SOURCES[source](tmp_path, PAIRS))
    assert spelled(pairs) == [
        [(ids("the cat"), ids("is good .")), (ids("the cat"), ids("is bad ."))],
        [(ids("a dog"), ids("was warm .")), (ids("a dog"), ids("was ."))],
    ]
    assert all(t.prompt.dtype == t.response.dtype == np.int64 for e in pairs for t in e.texts)


@pytest.mark.parametrize("source", SOURCES)
def test_numbers_and_lists_come_through_every_source(source, tmp_path):
    rows = [
        {"prompt": "the", "tokens": [5, 6], "labels": [0, 1.0], "own": [True, False]},
        {"prompt": "a", "tokens": [7], "labels": [0.5], "own": [True]},
    ]
    (tmp_path / "l").mkdir()
    labels = read(SOURCES[source](tmp_path / "l", rows), "labels")
    assert [e.texts[0].target.tolist() for e in labels] == [[0, 1], [0.5]]
    assert [e.texts[0].own.tolist() for e in labels] == [[True, False], [True]]
    outcomes = [{"prompt": "the", "completion": "cat", "label": label} for label in (True, False)]
    (tmp_path / "s").mkdir()
    assert [e.scores for e in read(SOURCES[source](tmp_path / "s", outcomes), "scores")] == [
        (1.0,),
        (0.0,),
    ]
