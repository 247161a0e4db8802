import json

import datasets
import fakes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenenv.errors import InvalidArgument
from tokenenv.prompts import draw, fit_prompt, load_prompts, stream_start, to_ids

CHAT = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}it{% endif %}"
TEXTS = ["the cat is", "rain", "a good film"]
IDS = [[3, 6, 28], [14], [4, 18, 9]]
OPTIONS = {"vocab_size": fakes.VOCAB_SIZE, "max_prompt_tokens": 4}


@pytest.fixture(scope="module")
def tokenizer():
    made = fakes.tokenizer(["the", "cat", "is", "rain", "a", "good", "film", "user", "it"])
    made.chat_template = CHAT
    return made


@pytest.fixture(scope="module")
def ids(tokenizer):
    """TEXTS by hand: words are numbered from 3."""
    assert tokenizer(TEXTS)["input_ids"] == [[3, 4, 5], [6], [7, 8, 9]]
    return [[3, 4, 5], [6], [7, 8, 9]]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_a_list_of_texts_of_ids_or_of_both(tokenizer, ids):
    assert load_prompts(TEXTS, tokenizer, **OPTIONS) == ids
    assert load_prompts(tuple(ids), None, **OPTIONS) == ids
    mixed = [TEXTS[0], np.array(ids[1]), torch.tensor(ids[2])]
    loaded = load_prompts(mixed, tokenizer, **OPTIONS)
    assert loaded == ids
    assert all(type(token) is int for prompt in loaded for token in prompt)


def test_a_text_file_holds_one_prompt_a_line(tokenizer, ids, tmp_path):
    path = write(tmp_path / "prompts.txt", "\ufeffthe cat is\r\n\n  \nrain\na good film")
    assert load_prompts(path, tokenizer, **OPTIONS) == ids
    assert load_prompts(str(path), tokenizer, **OPTIONS) == ids


def test_only_newlines_separate_prompts(tokenizer, tmp_path):
    text = "the\u2028cat\x0cis\x85rain"
    as_text = write(tmp_path / "prompts.txt", text + "\n")
    as_json = write(
        tmp_path / "prompts.jsonl", json.dumps({"prompt": text}, ensure_ascii=False) + "\n"
    )
    assert (
        load_prompts(as_text, tokenizer, **OPTIONS)
        == load_prompts(as_json, tokenizer, **OPTIONS)
        == [[3, 4, 5, 6]]
    )


def test_jsonl_holds_texts_ids_or_bare_strings(tokenizer, ids, tmp_path):
    lines = [{"prompt": TEXTS[0], "other": 1}, {"prompt": ids[1]}, TEXTS[2]]
    path = write(tmp_path / "prompts.jsonl", "\n".join(map(json.dumps, lines)))
    assert load_prompts(path, tokenizer, **OPTIONS) == ids
    renamed = write(tmp_path / "q.jsonl", json.dumps({"question": "rain"}))
    assert load_prompts(renamed, tokenizer, column="question", **OPTIONS) == [ids[1]]


def test_a_dataset_and_a_streamed_one(tokenizer, ids):
    dataset = datasets.Dataset.from_dict({"question": TEXTS, "other": [1, 2, 3]})
    for source in (dataset, dataset.to_iterable_dataset(), dataset["question"]):
        assert load_prompts(source, tokenizer, column="question", **OPTIONS) == ids
    as_ids = datasets.Dataset.from_dict({"prompt": ids})
    assert load_prompts(as_ids, None, **OPTIONS) == ids


def test_the_chat_template_wraps_strings_and_messages(tokenizer):
    messages = [{"role": "user", "content": "rain"}]
    loaded = load_prompts(["rain", messages], tokenizer, chat_template=True, **OPTIONS)
    assert loaded == [[10, 6, 11], [10, 6, 11]]


def test_long_prompts_are_refused_or_lose_their_first_tokens(tokenizer):
    long = ["rain", "the cat is a good film"]
    with pytest.raises(
        InvalidArgument,
        match=r"prompts\[1\] has 6 tokens and max_prompt_tokens=4.*long_prompts='truncate'",
    ):
        load_prompts(long, tokenizer, **OPTIONS)
    assert load_prompts(long, tokenizer, long_prompts="truncate", **OPTIONS) == [[6], [5, 7, 8, 9]]
    with pytest.raises(
        InvalidArgument, match="long_prompts='cut' is not known; allowed: refuse, truncate"
    ):
        load_prompts(long, tokenizer, long_prompts="cut", **OPTIONS)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "prompts=<list> holds no prompts"),
        ([[3], []], r"prompts\[1\] is empty"),
        ([[3], ""], r"prompts\[1\] is empty"),
        (
            [3, 4],
            r"prompts\[0\] is no text \(type int\); allowed: a string or a sequence of token ids",
        ),
        ([[3], None], r"prompts\[1\] is no text \(type NoneType\)"),
        ([[3.0, 4.0]], r"prompts\[0\] is no text \(type list\); allowed"),
        (
            [[{"role": "user", "content": "rain"}]],
            r"prompts\[0\] is no text \(type list\).*chat_template=True",
        ),
        ([[3, fakes.VOCAB_SIZE]], r"prompts\[0\]: token id 61 is out of range; allowed: 0 to 60"),
        ([[3], [-1]], r"prompts\[1\]: token id -1 is out of range"),
        ({"a": 1}, "prompts=<dict> is of type dict; allowed: a list, a path, a datasets.Dataset"),
        (datasets.Dataset.from_dict({"prompt": []}), "holds no prompts"),
        (
            datasets.Dataset.from_dict({"text": ["a"], "id": [1]}),
            r"prompts\[0\] holds no 'prompt'; name the right one with prompt_column=.* text, id",
        ),
        (
            datasets.DatasetDict(train=datasets.Dataset.from_dict({"prompt": ["a"]})),
            "several splits; give one of them: train",
        ),
    ],
)
def test_unusable_prompts_are_named(source, message, tokenizer):
    with pytest.raises(InvalidArgument, match=message):
        load_prompts(source, tokenizer, **OPTIONS)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "", r"p\.txt' holds no prompts"),
        ("p.txt", "\n \n", r"p\.txt' holds no prompts"),
        ("p.jsonl", "", r"p\.jsonl' holds no prompts"),
        (
            "p.jsonl",
            '"rain"\n\n{"prompt": "rain"\n',
            r"p\.jsonl:3 is not JSON \(.*\); each line holds one value",
        ),
        (
            "p.jsonl",
            '{"text": "rain"}',
            r"p\.jsonl:1 holds no 'prompt'; name the right one with prompt_column=",
        ),
        ("p.jsonl", "17", r"p\.jsonl:1 is no text \(type int\)"),
        ("p.jsonl", '{"prompt": null}', r"p\.jsonl:1 is no text \(type NoneType\); allowed"),
        ("p.txt", "rain\nrain rain rain rain rain", r"p\.txt:2 has 5 tokens"),
    ],
)
def test_unusable_files_are_named_with_the_line(name, text, message, tokenizer, tmp_path):
    with pytest.raises(InvalidArgument, match=message):
        load_prompts(write(tmp_path / name, text), tokenizer, **OPTIONS)


def test_a_missing_file_and_one_that_is_no_text(tokenizer, tmp_path):
    with pytest.raises(
        InvalidArgument,
        match=r"absent\.jsonl' is not a file; give a list, or a file of these: \.jsonl, ",
    ):
        load_prompts(str(tmp_path / "absent.jsonl"), tokenizer, **OPTIONS)
    with pytest.raises(InvalidArgument, match="is not a file"):
        load_prompts(tmp_path, tokenizer, **OPTIONS)
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(InvalidArgument, match=r"latin\.txt' is not UTF-8 text"):
        load_prompts(tmp_path / "latin.txt", tokenizer, **OPTIONS)


def test_texts_need_a_tokenizer_and_templates_one_that_has_them(tokenizer):
    with pytest.raises(
        InvalidArgument, match=r"prompts\[0\]: tokens of this env have no text; give token ids"
    ):
        load_prompts(["rain"], None, **OPTIONS)
    for without in (None, fakes.tokenizer()):
        with pytest.raises(
            InvalidArgument, match="chat_template=True needs a tokenizer with a chat template"
        ):
            load_prompts(["rain"], without, chat_template=True, **OPTIONS)
    for wrong in ([3, 4], 3):
        with pytest.raises(
            InvalidArgument, match=r"prompts\[0\] must be a string or a list of chat messages"
        ):
            load_prompts([wrong], tokenizer, chat_template=True, **OPTIONS)


def test_what_a_template_refuses_is_said():
    tokenizer = fakes.tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InvalidArgument, match=r"prompts\[0\]: .*roles must alternate"):
        load_prompts(["rain"], tokenizer, chat_template=True, **OPTIONS)


def test_a_text_that_arrayconversion_turned_into_a_generator_is_refused():
    with pytest.raises(
        InvalidArgument, match="cannot pass through ArrayConversion; give token ids"
    ):
        to_ids(
            "<generator object array_conversion at 0x7f>",
            fakes.tokenizer(),
            61,
            "options['prompts'][0]",
        )


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.integers(0, 60), min_size=1, max_size=12), st.integers(1, 12))
def test_truncation_keeps_a_suffix_of_the_allowed_length(ids, limit):
    kept = fit_prompt(ids, limit, "truncate", "prompt")
    assert kept == ids[len(ids) - len(kept) :]
    assert len(kept) == min(len(ids), limit)


def drawn(count: int, pairs: list[tuple[int, int]]) -> list[int]:
    """The indices of the draws (seed, number) of `count` prompts."""
    starts = np.array([stream_start(seed) for seed, _ in pairs], dtype=np.uint64)
    return draw(count, starts, np.array([number for _, number in pairs])).tolist()


@pytest.mark.parametrize("along", ["numbers", "seeds"])
def test_draws_are_uniform(along):
    pairs = (
        [(7, k) for k in range(3000)] if along == "numbers" else [(seed, 2) for seed in range(3000)]
    )
    counts = np.bincount(drawn(3, pairs), minlength=3)
    assert abs(counts - 1000).max() < 100  # four standard deviations


@pytest.mark.parametrize("count", [2, 1000, 2**31 + 11])
def test_draws_are_splitmix64_numbers_scaled_to_the_number_of_prompts(count):
    """SplitMix64's first numbers for a seed of 0, as its author's own program prints them."""
    numbers = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    order = np.array([2, 0, 1])
    found = draw(count, np.zeros(3, dtype=np.uint64), order)
    assert found.tolist() == [numbers[k] * count >> 64 for k in order]


def test_draws_depend_on_nothing_but_seed_and_number():
    assert drawn(1000, [(2**200, 5)]) == drawn(1000, [(3, 1), (2**200, 5)])[1:]
    pairs = [(s, k) for s in range(40) for k in range(20)]
    both = [drawn(1000, pairs), drawn(1000, [(s + 1, k) for s, k in pairs])]
    assert abs(np.corrcoef(both)[0, 1]) < 0.12  # three standard deviations


@pytest.mark.parametrize("text", ["\ud800", "half \udfff a character"])
def test_half_a_character_is_refused(text):
    with pytest.raises(InvalidArgument, match=r"holds half a character \(U\+D"):
        load_prompts([text], fakes.tokenizer(), vocab_size=fakes.VOCAB_SIZE, max_prompt_tokens=5)


@pytest.mark.parametrize("line", ["[" * 100_000, "1" * 5000], ids=["deep", "long number"])
def test_json_that_python_does_not_read_is_named(line, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(line)
    with pytest.raises(InvalidArgument, match=r"p\.jsonl:1 is not JSON"):
        load_prompts(path, fakes.tokenizer(), vocab_size=fakes.VOCAB_SIZE, max_prompt_tokens=5)
