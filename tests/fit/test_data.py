"""Data of people's own: every file, folder and dataset gives the same examples, and every column of
the field is read."""

import csv
import json

import datasets
import fakes
import numpy as np
import pytest
from makes import MAKES

from tokenenv.errors import InvalidArgument
from tokenenv.fit.columns import read_row
from tokenenv.fit.data import read_examples, require_contrast, saved_tokenizer
from tokenenv.fit.examples import Example, Skipped, Text

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
    """Prompts and responses as words, without the stop token, and scores."""
    whole = [[TOKENIZER.decode(t.ids, skip_special_tokens=True) for t in e.texts] for e in examples]
    return [(one, e.scores) for one, e in zip(whole, examples, strict=True)]


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


def test_rows_of_a_file_are_not_held_together(monkeypatch, tmp_path):
    """Each line is parsed when its turn has come: an example is there before the next line is."""
    lines = []
    parse = json.loads
    monkeypatch.setattr(
        "tokenenv.tables.json.loads", lambda text: lines.append(text) or parse(text)
    )
    seen = []
    monkeypatch.setattr(
        "tokenenv.fit.data.read_row",
        lambda row, kind, encoder: seen.append(len(lines)) or read_row(row, kind, encoder),
    )
    assert len(read(jsonl(tmp_path / "d.jsonl", PAIRS * 3))) == 6
    assert seen == [1, 2, 3, 4, 5, 6]


def test_a_dataset_of_several_splits_is_refused_by_their_names():
    splits = {"train": datasets.Dataset.from_list(PAIRS), "test": datasets.Dataset.from_list(PAIRS)}
    for several in (
        datasets.DatasetDict(splits),
        datasets.IterableDatasetDict({k: v.to_iterable_dataset() for k, v in splits.items()}),
    ):
        with pytest.raises(InvalidArgument, match=r"data is a dataset .* one of them: train, test"):
            read(several)


def test_a_folder_gives_its_data_and_its_tokenizer(tmp_path):
    made = folder(tmp_path / "sample", PAIRS)
    assert saved_tokenizer(made) is saved_tokenizer(PAIRS) is None
    TOKENIZER.save_pretrained(made / "tokenizer")
    assert saved_tokenizer(str(made)) == made / "tokenizer"
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        InvalidArgument, match=r"is a folder without data\.jsonl .* episodes\.jsonl"
    ):
        read(tmp_path / "empty")


# ---------------------------------------------------------------- columns


def test_ids_go_before_texts_and_stay_as_they_are():
    row = {"prompt": "the", "prompt_ids": [9], "chosen": "cat", "chosen_ids": [8], "rejected": "a"}
    assert spelled(read([row])) == [[([9], [8]), ([9], ids("a ."))]]
    row = {"prompt": "the", "tokens": [8, 9], "response": "cat", "score": 1}
    assert spelled(read([row], "scores")) == [[(ids("the"), [8, 9])]]
    lists = {"prompt_ids": np.array([3]), "responses_ids": [np.array([4, 5]), (6,)]}
    assert spelled(read([lists], tokenizer=None)) == [[([3], [4, 5]), ([3], [6])]]


def test_a_text_gets_the_stop_token_unless_it_has_it_or_was_cut():
    rows = [
        {"prompt": "the", "response": "cat", "score": 1},
        {"prompt": "the", "response": "cat <eos>", "score": 2},
        {"prompt": "the", "response": "cat", "score": 3, "truncated": True},
        {"prompt": "the", "response": "cat", "score": 4, "truncated": 0},
        {"prompt": "the", "response_ids": ids("cat"), "score": 5},
    ]
    responses = [e.texts[0].response.tolist() for e in read(rows, "scores")]
    assert responses == [ids(one) for one in ("cat .", "cat .", "cat", "cat .", "cat")]
    pair = {"prompt": "the", "chosen": "cat", "rejected": "dog", "truncated": [0, 1]}
    assert spelled(read([pair])) == [[(ids("the"), ids("cat .")), (ids("the"), ids("dog"))]]
    several = {"prompt": "the", "responses": ["cat", "dog"], "truncated": [True, False]}
    assert spelled(read([several])) == [[(ids("the"), ids("cat")), (ids("the"), ids("dog ."))]]
    both = {"prompt": "the", "chosen": "cat", "rejected": "dog", "truncated": True}
    assert spelled(read([both])) == [[(ids("the"), ids("cat")), (ids("the"), ids("dog"))]]


def test_responses_are_ranked_by_their_order_or_by_their_scores():
    row = {"prompt": "the", "responses": ["cat", "dog", "sun"]}
    assert texts(read([row])) == [(["the cat", "the dog", "the sun"], None)]
    row["scores"] = [0.5, -1, True]
    assert texts(read([row])) == [(["the sun", "the cat", "the dog"], (1.0, 0.5, -1.0))]
    alone = [(["the cat"], (0.5,)), (["the dog"], (-1.0,)), (["the sun"], (1.0,))]
    assert texts(read([row], "scores")) == alone
    assert [e.where for e in read([row], "scores")] == ["data[0]"] * 3


def test_scores_of_one_prompt_in_several_rows_are_one_ranking():
    rows = [
        {"prompt": "the", "response": "cat", "score": 1},
        {"prompt": "a", "response": "sun", "score": 5},
        {"prompt": "the", "response": "dog", "score": 3},
        {"prompt": "a", "chosen": "sea", "rejected": "hill"},
        {"prompt": "a", "response": "rain", "label": 0},
    ]
    assert texts(read(rows)) == [
        (["a sea", "a hill"], None),
        (["the dog", "the cat"], (3.0, 1.0)),
        (["a sun", "a rain"], (5.0, 0.0)),
    ]
    del rows[3]
    assert len(read(rows, "scores")) == 4


def test_outcomes_are_scores():
    """TRL's unpaired preferences: prompt, completion, label."""
    rows = [
        {"prompt": "the", "completion": "cat", "label": True},
        {"prompt": "the", "completion": "dog", "label": np.False_},
        {"prompt": "the", "completion": "sun", "label": None, "score": 0.25},
    ]
    assert [e.scores for e in read(rows, "scores")] == [(1.0,), (0.0,), (0.25,)]


def test_labels_belong_to_tokens_and_null_says_nothing():
    row = {"prompt": "the", "tokens": ids("cat dog ."), "labels": [1, None, 0.5]}
    [text] = read([row], "labels")[0].texts
    assert text.target.dtype == np.float32
    np.testing.assert_array_equal(text.target, [1, np.nan, 0.5])
    # The stop token that is put behind a text may have a label, or have none.
    row = {"prompt": "the", "response": "cat dog", "labels": [1, 0], "own": [0, 1]}
    [text] = read([row], "labels")[0].texts
    np.testing.assert_array_equal(text.target, [1, 0, np.nan])
    assert text.own.tolist() == [False, True, True]
    [text] = read([row | {"labels": [1, 0, 1], "own": [0, 1, 0]}], "labels")[0].texts
    assert text.target.tolist() == [1, 0, 1]
    assert text.own.tolist() == [False, True, False]


def test_values_are_any_numbers():
    row = {"prompt": "the", "response_ids": [7, 8], "values": np.array([-3.5, 12])}
    assert read([row], "values")[0].texts[0].target.tolist() == [-3.5, 12]


def test_the_first_token_stands_for_a_prompt_that_is_missing():
    row = {"tokens": ids("the cat dog ."), "labels": [0, 1, None, 0.5], "own": [1, 1, 0, 1]}
    ((found,),) = (example.texts for example in read([row], "labels"))
    with_prompt = {"prompt": "the", "tokens": row["tokens"][1:], "labels": [1, None, 0.5]}
    ((same,),) = (one.texts for one in read([with_prompt | {"own": [1, 0, 1]}], "labels"))
    assert found.ids.tolist() == same.ids.tolist()
    np.testing.assert_array_equal(found.target, same.target)
    assert found.own_mask.tolist() == same.own_mask.tolist() == [True, False, True]


def test_own_tokens_are_read_beside_every_kind_of_response():
    pair = {"prompt_ids": [3], "chosen_ids": [4, 5], "rejected_ids": [6], "chosen_own": [0, 1]}
    chosen, rejected = read([pair])[0].texts
    assert chosen.own.tolist() == [False, True]
    assert rejected.own is None
    several = {"prompt_ids": [3], "responses_ids": [[4, 5], [6]], "responses_own": [None, [1]]}
    first, second = read([several])[0].texts
    assert first.own is None
    assert second.own.tolist() == [True]


def test_texts_are_taken_from_every_column_that_has_some():
    rows = [
        {"prompt": "the", "response": "cat"},
        {"prompt": "the", "chosen": "dog", "rejected": "sun"},
        {"prompt": "the", "responses": ["sea", "hill"], "scores": [1, 1]},
        {"prompt": "the", "completions": ["old", "tree"], "labels": [True, False]},
    ]
    found = [" ".join(map(str, e.texts[0].response[:-1])) for e in read(rows, "texts")]
    expected = ["cat", "dog", "sun", "sea", "hill", "old tree"]
    assert found == [" ".join(map(str, ids(one))) for one in expected]


def test_a_prompt_that_both_texts_begin_with_may_be_left_out():
    """Anthropic's hh-rlhf: two whole dialogues as texts."""
    row = {"chosen": "the cat is not good", "rejected": "the cat is not so bad"}
    assert spelled(read([row])) == [
        [(ids("the cat is not"), ids("good .")), (ids("the cat is not"), ids("so bad ."))]
    ]
    # One is the beginning of the other: each keeps a word.
    row = {"chosen": "the cat is", "rejected": "the cat"}
    assert spelled(read([row])) == [[(ids("the"), ids("cat is .")), (ids("the"), ids("cat ."))]]


# ---------------------------------------------------------------- labels of characters


@pytest.mark.parametrize("make", ["bytes", "legacy", "metaspace"])
def test_a_span_labels_the_tokens_of_its_characters(make):
    tokenizer, text = MAKES[make](), " is good, not walking 😀 café"
    places = [text.index(word) for word in ("good", "not", "café")]
    ends = [places[0] + 4, places[1] + 3, len(text)]
    spans = [
        {"start": start, "end": end, "label": label}
        for start, end, label in zip(places, ends, [1, 0, 0.5], strict=True)
    ]
    row = {"prompt": "the cat", "response": text, "spans": spans[::-1]}
    [found] = read([row], "labels", tokenizer=tokenizer, vocab_size=len(tokenizer))[0].texts
    marked = {0.0: "", 1.0: "", 0.5: ""}
    for label in marked:
        tokens = found.response[found.target == label]
        marked[label] = tokenizer.decode(tokens).strip()
    assert marked == {0.0: "not", 1.0: "good", 0.5: "café"}
    assert np.isnan(found.target[-1])  # the stop token


def test_a_token_in_two_spans_gets_the_mean_by_its_characters():
    spans = [{"start": 0, "end": 1, "label": 1}, {"start": 1, "end": 3, "label": 0.25}]
    row = {"prompt": "the", "response": "cat dog", "spans": spans}
    [text] = read([row], "labels")[0].texts
    np.testing.assert_allclose(text.target, [0.5, np.nan, np.nan])


def test_steps_label_all_their_tokens():
    """TRL's process reward data."""
    row = {
        "prompt": "the",
        "completions": ["cat is", "dog", " not\n", "sun"],
        "labels": [1, 0, 1, 0],
    }
    tokenizer = MAKES["bytes"]()
    [text] = read([row], "labels", tokenizer=tokenizer, vocab_size=len(tokenizer))[0].texts
    assert tokenizer.decode(text.response) == "cat is\ndog not\nsun</s>"
    steps = [tokenizer.decode(text.response[text.target == label]) for label in (1, 0)]
    assert steps == ["cat is\n not\n", "dogsun</s>"]


# ---------------------------------------------------------------- what cannot be learnt from


def test_what_says_nothing_is_left_out_and_counted():
    skipped = Skipped()
    rows = [
        *PAIRS,
        {"prompt": "the", "chosen": "cat", "rejected": "cat"},
        {"prompt": "the", "chosen": "cat " * 9, "rejected": "dog"},
        {"prompt": "the", "responses": ["cat", "dog", "cat"]},
        {"prompt": "a", "responses": ["cat", "dog", "sun"], "scores": [1, 0, 1]},
        {"prompt": "a", "responses": ["cat", "dog"], "scores": [1, 1]},
        {"prompt": "of", "response": "cat", "score": 3},
        {"prompt": "the", "responses": ["rain"]},
    ]
    assert texts(read(rows, skipped=skipped, max_length=8))[2:] == [
        (["the cat", "the dog"], None),
        (["a cat", "a dog"], (1.0, 0.0)),
    ]
    assert skipped.places == {
        "chosen and rejected are identical": ["data[2]"],
        "the text has more than 8 tokens": ["data[3]"],
        "a ranking holds the text twice": ["data[4]"],
        "a text's score ties with another's in its ranking": ["data[5]", "data[6]"],
        "a prompt has one text alone": ["data[8]", "data[7]"],
    }
    assert skipped.lines()[3].startswith("2 left out: a text's score ties")


def test_a_long_text_is_left_out_of_every_kind():
    row = {"prompt": "the", "response": "cat dog", "score": 1, "values": [1, 2], "labels": [0, 1]}
    long = row | {"response": "cat dog sun", "values": [1, 2, 3], "labels": [0, 1, 1]}
    for kind in ("scores", "values", "labels", "texts"):
        skipped = Skipped()
        assert len(read([row, long], kind, skipped, max_length=4)) == 1
        assert skipped.places == {"the text has more than 4 tokens": ["data[1]"]}
        assert len(read([row, long], kind, max_length=5)) == 2


def test_nothing_left_is_an_error_that_says_why():
    same = {"prompt": "the", "chosen": "cat", "rejected": "cat"}
    with pytest.raises(InvalidArgument, match=r"nothing to learn from: 2 left out: chosen and rej"):
        read([same] * 2)
    with pytest.raises(InvalidArgument, match=r"data=<list> has nothing .*: it holds no rows\."):
        read([])


def example(score=None, target=None):
    target = None if target is None else np.array(target, np.float32)
    text = Text(np.array([1]), np.array([2, 3]), target)
    return Example((text,), None if score is None else (score,))


@pytest.mark.parametrize(
    ("kind", "same", "different", "message"),
    [
        ("scores", [example(1.0)] * 3, example(0.5), "all scores of its 3 examples are 1;"),
        (
            "labels",
            [example(target=[0, np.nan])] * 2,
            example(target=[1, np.nan]),
            "all labels of its 2 examples are 0;",
        ),
        ("values", [example(target=[2, 2])], example(target=[2, 3]), "all values of its 1 ex"),
        ("labels", [example(target=[np.nan] * 2)], example(target=[1, 0]), "labels .* are missing"),
    ],
)
def test_one_class_alone_teaches_nothing(kind, same, different, message):
    with pytest.raises(InvalidArgument, match=message):
        require_contrast(same, kind)
    require_contrast([*same, different], kind)


def test_rankings_and_texts_need_no_contrast():
    require_contrast([example()], "ranking")
    require_contrast([example()], "texts")
