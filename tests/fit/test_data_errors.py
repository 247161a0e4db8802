"""Bad data: one clear error that names the line, whatever a row holds."""

import json
import math

import fakes
import numpy as np
import pytest
import torch
from chat_templates import FAMILIES, tokenizer_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenenv.errors import InvalidArgument
from tokenenv.fit.columns import KINDS
from tokenenv.fit.data import read_examples
from tokenenv.fit.examples import Skipped

TOKENIZER = fakes.tokenizer()


def read(source, kind, tokenizer=TOKENIZER, **options):
    options = {"vocab_size": fakes.VOCAB_SIZE, "skipped": Skipped()} | options
    return read_examples(source, kind, tokenizer, **options)


PAIR = {"prompt": "the", "chosen": "cat", "rejected": "dog"}
SCORED = {"prompt": "the", "response": "cat", "score": 1.5}
LABELLED = {"prompt": "the", "tokens": [7, 8], "labels": [0, 1]}
SPANS = {"prompt": "the", "response": "the cat", "spans": [{"start": 0, "end": 3, "label": 1}]}
STEPS = {"prompt": "the", "completions": ["cat", "dog"], "labels": [True, False]}
VALUED = {"prompt": "the", "tokens": [7, 8], "values": [0.5, 9]}
RANKED = {"prompt": "the", "responses": ["cat", "dog"], "scores": [1, 2]}


def span(start, end, label=1):
    return {"spans": [{"start": start, "end": end, "label": label}]}


BAD = [
    # Columns that are missing: those that are there, and those that are wanted.
    (
        "ranking",
        {"prompt": "the", "preferred": "cat", "rejected": "dog"},
        r"has the columns prompt, preferred, rejected; rankings are read from prompt, and chosen and",
    ),
    ("scores", PAIR, r"has the columns prompt, chosen, rejected; scores are read .* and score"),
    (
        "labels",
        SCORED,
        r"the columns prompt, response, score; labels are read .* tokens and labels",
    ),
    ("values", LABELLED, "values are read from prompt, and response and values"),
    ("texts", {"prompt": "the"}, "texts are read from prompt, and response, or"),
    ("texts", {}, r"has the columns \(none\); texts are"),
    (
        "ranking",
        PAIR | {"prompt": None},
        r"has the columns chosen, rejected; the prompt is missing",
    ),
    ("scores", {"response": "cat", "score": 1}, "the columns response, score; the prompt is mis"),
    ("ranking", PAIR | {"chosen": None}, "the columns prompt, rejected; rankings are read"),
    ("scores", {"prompt": "the", "responses": ["cat"]}, "scores are read from"),
    # Scores.
    ("scores", SCORED | {"score": math.nan}, r"'score' is nan; it must be a finite number"),
    ("scores", SCORED | {"score": None}, "'score' is None; it must be a finite number"),
    ("scores", SCORED | {"score": -math.inf}, "'score' is -inf;"),
    ("scores", SCORED | {"score": "0.5"}, r"'score' is '0\.5'; it must be a finite number"),
    ("scores", SCORED | {"score": [1]}, r"'score' is \[1\];"),
    ("scores", SCORED | {"score": 10**400}, "'score' is 1000000"),
    ("scores", SCORED | {"score": 1e39}, r"'score' is 1e\+39;"),
    ("ranking", RANKED | {"scores": [1, math.nan]}, r"'scores\[1\]' is nan"),
    ("ranking", RANKED | {"scores": [1]}, "'scores' has 1 entries for 2 responses"),
    ("ranking", RANKED | {"scores": "12"}, "'scores' is '12'; it must be a list"),
    ("ranking", RANKED | {"responses": []}, "'responses' is empty"),
    # Labels and values.
    ("labels", LABELLED | {"labels": [0]}, "'labels' has 1 entries for 2 tokens of the response"),
    ("labels", LABELLED | {"labels": [0, 1, 1]}, "'labels' has 3 entries for 2 tokens"),
    (
        "labels",
        LABELLED | {"labels": [0, 2]},
        r"'labels'\[1\] is 2; it must be a number from 0 to 1",
    ),
    ("labels", LABELLED | {"labels": [-100, 0]}, r"'labels'\[0\] is -100; .* from 0 to 1"),
    ("labels", LABELLED | {"labels": [math.nan, 0]}, r"'labels'\[0\] is nan"),
    ("labels", LABELLED | {"labels": ["B", "I"]}, r"'labels'\[0\] is 'B'"),
    ("labels", LABELLED | {"labels": [None, None]}, "says nothing of any token of its response"),
    ("labels", LABELLED | {"labels": 1}, "'labels' is 1; it must be a list"),
    ("values", VALUED | {"values": [1, math.inf]}, r"'values'\[1\] is inf; .* a finite number"),
    ("values", VALUED | {"values": []}, "'values' has 0 entries for 2 tokens"),
    # Spans.
    ("labels", SPANS | span(0, 8), r"'spans'\[0\] goes from 0 to 8; .* the characters 0 to 7"),
    ("labels", SPANS | span(-1, 2), r"'spans'\[0\] goes from -1 to 2;"),
    ("labels", SPANS | span(3, 3), r"'spans'\[0\] goes from 3 to 3;"),
    ("labels", SPANS | span(0.5, 3), r"'spans'\[0\] goes from 0\.5 to 3;"),
    ("labels", SPANS | span(0, 3, 1.5), r"'spans'\[0\].label is 1\.5; .* from 0 to 1"),
    ("labels", SPANS | span(3, 4), "says nothing of any token"),
    ("labels", SPANS | {"spans": []}, "says nothing of any token"),
    ("labels", SPANS | {"spans": [[0, 3, 1]]}, r"'spans'\[0\] is \[0, 3, 1\]; it must be {\"start"),
    (
        "labels",
        SPANS | {"spans": [*span(2, 5)["spans"], *span(0, 3)["spans"]]},
        "'spans' holds spans that overlap, at character 2",
    ),
    # Steps.
    ("labels", STEPS | {"labels": [True]}, "'labels' has 1 entries for 2 completions"),
    ("labels", STEPS | {"completions": ["cat", ""]}, "'completions' must be a list of texts, none"),
    ("labels", STEPS | {"completions": "cat"}, "'completions' is 'cat'; it must be a list"),
    # Texts and ids.
    ("ranking", PAIR | {"prompt": ""}, "'prompt' is empty; a prompt needs at least one token"),
    ("ranking", PAIR | {"rejected": ""}, "'rejected' is empty; a response needs at least one"),
    ("ranking", PAIR | {"rejected": " "}, "'rejected' is empty; a response needs at least one"),
    ("scores", SCORED | {"response_ids": []}, "'response_ids' is empty"),
    ("scores", SCORED | {"response_ids": [7, 61]}, r"'response_ids'.* 61 .* allowed: 0 to 60"),
    ("scores", SCORED | {"prompt_ids": [-1]}, r"'prompt_ids'.* -1 is out of range"),
    ("scores", SCORED | {"prompt_ids": [1.5]}, "'prompt_ids' is no text"),
    ("scores", SCORED | {"prompt": 7}, r"'prompt' is no text \(type int\)"),
    ("scores", SCORED | {"response": 7}, r"'response' is no text \(type int\)"),
    ("scores", SCORED | {"response": "\ud800"}, "'response' holds half a character"),
    ("ranking", RANKED | {"responses": ["cat", 3]}, r"'responses\[1\]' is no text"),
    ("scores", SCORED | {"own": [1, 1, 1]}, "'own' has 3 entries for 2 tokens of the response"),
    ("labels", LABELLED | {"own": [1]}, "'own' has 1 entries for 2 tokens of the response"),
    ("labels", LABELLED | {"own": [0, 0]}, "'own' is 0 everywhere"),
    ("labels", LABELLED | {"own": [0, 2]}, "'own' holds 2; allowed: 0 and 1"),
    ("scores", SCORED | {"truncated": "no"}, r"'truncated'\[0\] is 'no'"),
    ("ranking", RANKED | {"truncated": [1]}, "'truncated' has 1 entries for 2 texts"),
    # Rows.
    ("ranking", ["the", "cat"], r"is \['the', 'cat'\]; a row must map names of columns to values"),
    ("ranking", "the cat", "is 'the cat'; a row must map names"),
]
GOOD = {"ranking": PAIR, "scores": SCORED, "labels": LABELLED, "values": VALUED, "texts": PAIR}


@pytest.mark.parametrize(("kind", "row", "message"), BAD)
def test_bad_rows_are_named_with_their_line(kind, row, message, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("\n\n".join(json.dumps(one) for one in (GOOD[kind], row)), encoding="utf-8")
    for source, where in ((path, rf"d\.jsonl:3\b.*{message}"), ([row], rf"data\[0\].*{message}")):
        with pytest.raises(InvalidArgument, match=where):
            read(source, kind)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("d.jsonl", "", r"data='.*d\.jsonl' has nothing to learn from: it holds no rows\."),
        ("d.csv", "prompt,chosen,rejected\n", "it holds no rows"),
        ("d.json", "[]", "it holds no rows"),
        ("d.jsonl", '{"prompt": "a"\n', r"d\.jsonl:1 is not JSON"),
        (
            "d.csv",
            "prompt,response,score\nthe,cat,nan\n",
            r"d\.csv:2: 'score' is 'nan'; it must be",
        ),
        ("d.csv", "prompt,response,score\nthe,cat,\n", r"d\.csv:2: 'score' is None"),
        ("d.txt", "the cat\n", r"d\.txt:1 is 'the cat'; a row must map"),
        ("d.xlsx", "", r"data='.*d\.xlsx' ends in '\.xlsx'; allowed: \.jsonl"),
        ("d.parquet", "PAR1", r"d\.parquet' is no Parquet file"),
    ],
)
def test_bad_files_are_named(name, text, message, tmp_path):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(InvalidArgument, match=message):
        read(tmp_path / name, "scores")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.jsonl", r"data='missing\.jsonl' is not a file"),
        (7, r"data=<int> is of type int; allowed: a list, a path, a datasets\.Dataset"),
        (PAIR, "data=<dict> is of type dict"),
        (iter([PAIR]), "data=<list_iterator> is of type list_iterator"),
    ],
)
def test_what_is_no_data_is_named(source, message):
    with pytest.raises(InvalidArgument, match=message):
        read(source, "ranking")


def test_texts_need_a_tokenizer():
    with pytest.raises(
        InvalidArgument, match=r"data\[0\]: 'prompt' is a text, which needs a token"
    ):
        read([PAIR], "ranking", tokenizer=None)
    with pytest.raises(InvalidArgument, match="kind='pairs' is not known"):
        read([PAIR], "pairs")


# ---------------------------------------------------------------- any row

COLUMNS = sorted(
    {name for row in (PAIR, SCORED, LABELLED, SPANS, STEPS, VALUED, RANKED) for name in row}
    | {"prompt_ids", "chosen_ids", "response_ids", "responses_ids", "messages", "own", "label"}
    | {"truncated", "chosen_own", "responses_own", "completion"}
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", ""])},
    optional={"content": st.sampled_from(["a", "", " b ", "<|im_end|>", "\ud800", None, "\ue000"])},
)
NUMBERS = st.one_of(
    st.integers(-2, 70), st.booleans(), st.floats(), st.integers(), st.just(10**400), st.none()
)
SPAN = st.fixed_dictionaries(
    {"start": NUMBERS, "end": NUMBERS, "label": st.sampled_from([0, 1, 0.5, None, "x"])}
)
LETTERS = st.text("ab \n\0\ue001é😀\ud800<|>", max_size=6)
WORDS = st.lists(st.sampled_from([*fakes.WORDS, "<eos>", "unknown"]), max_size=4).map(" ".join)
ARRAYS = st.sampled_from(
    [
        np.arange(3),
        np.zeros((2, 2)),
        np.array(1.0),
        np.array(["a"]),
        torch.ones(2),
        torch.ones(2, 2),
    ]
)
ENTRY = st.one_of(NUMBERS, LETTERS, WORDS, MESSAGE, SPAN, ARRAYS)
SEVERAL = st.one_of(*(st.lists(one, max_size=4) for one in (NUMBERS, WORDS, MESSAGE, SPAN, ENTRY)))
VALUE = st.one_of(ENTRY, SEVERAL, st.lists(SEVERAL, max_size=3))
ROW = st.dictionaries(st.sampled_from([*COLUMNS, "other"]), VALUE, max_size=6)


@st.composite
def nearly_good(draw):
    """A good row, one of whose columns is replaced."""
    row = draw(st.sampled_from([PAIR, SCORED, LABELLED, SPANS, STEPS, VALUED, RANKED]))
    return row | {draw(st.sampled_from(COLUMNS)): draw(VALUE)}


CHATS = tokenizer_of(FAMILIES["chatml"])
READERS = [(TOKENIZER, False), (CHATS, True), (CHATS, False), (None, False)]


@settings(
    max_examples=250,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(row=nearly_good() | ROW, kind=st.sampled_from(list(KINDS)), reader=st.sampled_from(READERS))
def test_any_row_is_an_example_or_is_skipped_or_refused(row, kind, reader):
    tokenizer, chat_template = reader
    skipped, refusal, examples = Skipped(), "", []
    options = {"vocab_size": 61, "chat_template": chat_template, "skipped": skipped}
    try:
        examples = read([row], kind, tokenizer, **options, max_length=40)
    except InvalidArgument as error:
        refusal = str(error)
    assert bool(examples) != ("data[0]" in refusal)
    for example in examples:
        assert len(example.texts) >= (2 if kind == "ranking" else 1)
        assert (example.scores is not None) >= (kind == "scores")
        for text in example.texts:
            assert 2 <= len(text) <= 40
            assert ((text.ids >= 0) & (text.ids < 61)).all()
            assert text.own_mask.any()
            assert len(text.own_mask) == len(text.response)
            assert (text.target is not None) == (kind in ("labels", "values"))
            if text.target is not None:
                assert len(text.target) == len(text.response)
                assert not np.isnan(text.target).all()
        assert example.scores is None or np.isfinite(example.scores).all()
