"""The split by prompt, and the duplicates that are left across it."""

import time

import numpy as np
import pytest

from tokenenv.errors import InvalidArgument
from tokenenv.fit.examples import Example, Text
from tokenenv.fit.split import duplicates, split_by_prompt


def example(prompt, response, where=""):
    return Example((Text(np.array(prompt), np.array(response)),), where=where)


def prompts(examples):
    return {tuple(e.texts[0].prompt) for e in examples}


def test_all_examples_of_a_prompt_are_on_one_side():
    examples = [example([p], [p, i]) for i in range(3) for p in range(40)]
    train, held_out = split_by_prompt(examples, 0.25, seed=1)
    assert (len(prompts(train)), len(prompts(held_out))) == (30, 10)
    assert not prompts(train) & prompts(held_out)
    assert (len(train), len(held_out)) == (90, 30)
    # The order of the data stays as it was.
    assert [e for e in examples if e in train] == train


def test_the_split_depends_on_the_prompts_and_the_seed_alone():
    examples = [example([p, p], [p]) for p in range(50)]
    _, held_out = split_by_prompt(examples, 0.2, seed=1)
    _, again = split_by_prompt(examples[::-1], 0.2, seed=1)
    _, other = split_by_prompt(examples, 0.2, seed=2)
    assert prompts(held_out) == prompts(again) != prompts(other)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_both_sides_have_a_prompt(share):
    train, held_out = split_by_prompt([example([p], [1]) for p in range(3)], share)
    assert 0 < len(train) < 3
    assert len(held_out) == 3 - len(train)


def test_texts_of_one_prompt_are_split_as_texts():
    """The automata have one prompt."""
    examples = [example([0], [i % 20, 1]) for i in range(60)]
    train, held_out = split_by_prompt(examples, 0.1)
    seen = [{tuple(e.texts[0].response) for e in side} for side in (train, held_out)]
    assert not seen[0] & seen[1]
    assert (len(seen[1]), len(held_out)) == (2, 6)


@pytest.mark.parametrize("share", [0, 1, -0.5, 1.5, float("nan")])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(InvalidArgument, match="must be a share above 0 and below 1"):
        split_by_prompt([example([p], [1]) for p in range(3)], share)


def test_what_cannot_be_split_is_refused():
    with pytest.raises(InvalidArgument, match=r"held_out=0\.5 cannot split 2 examples"):
        split_by_prompt([example([0], [1, 2])] * 2, 0.5)
    with pytest.raises(InvalidArgument, match="cannot split 0 examples"):
        split_by_prompt([], 0.5)


def similarity(one, other):
    """The Jaccard similarity of runs of five tokens, as it is written in books."""
    runs = [{tuple(ids[i : i + 5]) for i in range(len(ids) - 4)} for ids in (one, other)]
    return len(runs[0] & runs[1]) / len(runs[0] | runs[1])


def test_near_duplicates_are_those_of_the_definition():
    random = np.random.default_rng(0)
    texts = [random.integers(0, 90, 60) for _ in range(30)]
    train = [example(ids[:10], ids[10:], f"t:{i}") for i, ids in enumerate(texts)]
    held_out, expected = [], 0
    for i, ids in enumerate(texts):
        changed = ids.copy()
        changed[random.integers(0, 60, random.integers(1, 4))] += 100
        held_out.append(example(changed[:10], changed[10:], f"h:{i}"))
        expected += similarity(ids, changed) >= 0.8
    assert 5 < expected < 25
    [sentence] = duplicates(train, held_out)
    assert sentence.startswith(f"{expected} of 30 held-out texts have a near duplicate in the ")


def test_sentences_name_the_first_places():
    random = np.random.default_rng(1)
    train = [example([i], random.integers(0, 90, 30), f"a.jsonl:{i}") for i in range(9)]
    near = train[3].texts[0].response.copy()
    near[-1] += 500
    held_out = [*train[4:], example([3], near, "b.jsonl:1"), example([7], [1, 2], "b.jsonl:2")]
    assert duplicates(train, held_out) == [
        "5 of 7 held-out texts are in the training data too: a.jsonl:4 and a.jsonl:4, a.jsonl:5 "
        "and a.jsonl:5, a.jsonl:6 and a.jsonl:6, and others.",
        "1 of 7 held-out texts have a near duplicate in the training data: b.jsonl:1 and "
        "a.jsonl:3.",
    ]
    assert duplicates(train[:4], train[4:]) == duplicates([], train) == duplicates(train, []) == []


def test_a_text_shorter_than_a_run_is_compared_as_a_whole():
    one, other = example([1], [2, 3], "a"), example([1, 2], [3], "b")
    assert duplicates([one], [other]) == [
        "1 of 1 held-out texts have a near duplicate in the training data: b and a."
    ]
    assert duplicates([one], [example([1], [2, 4], "b")]) == []


def test_a_prompt_that_many_share_makes_no_duplicates():
    random, prompt = np.random.default_rng(2), list(range(200))
    every = [example(prompt, random.integers(0, 5000, 20), f"{i}") for i in range(200)]
    assert duplicates(every[:100], every[100:]) == []


def test_ten_thousand_texts_take_seconds():
    random, prompt = np.random.default_rng(3), list(range(50))
    every = [example(prompt, random.integers(0, 500, 60)) for _ in range(10_000)]
    begin = time.process_time()
    assert duplicates(every[:9000], every[9000:]) == []
    assert time.process_time() - begin < 20
