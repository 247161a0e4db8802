"""Reviews-v0: the rule, the prompts, the tokenizer, and how its bundled models do."""

import random
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from sampling import sample, summed_scores

from tokenenv.envs.language.bundled import bundled_tokenizer
from tokenenv.envs.language.review_grammar import (
    openings,
    opinions,
    review,
    sentiment,
    split_words,
    vocabulary,
)
from tokenenv.envs.tasks import reviews
from tokenenv.errors import InvalidArgument


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the soup was good.", 1),
        ("the soup was bad.", -1),
        ("the soup was very good.", 2),
        ("the soup was not good.", -1),
        ("the soup was not very good.", -1),
        ("the soup was hardly dirty.", 1),
        ("i would never recommend this inn!", -1),
        ("we did not regret the wine.", 1),
        ("the soup was not hot and good.", 1),
        ("not today, good soup.", 1),
        ("not one of us two found it good.", 1),
        ("never not good.", 1),
        ("good morning. the soup was good but the slow train was bad.", 0),
        ("extremely rude and nice, clean.", 0),
        ("we had cold drinks in the garden.", 0),
        ("", 0),
        ("GOOD, 3 * fresh?", 2),
    ],
)
def test_sentiment_by_hand(text: str, expected: int) -> None:
    assert sentiment(text) == expected
    assert reviews.gold("", text) == float(expected > 0)


def test_gold_reads_across_the_end_of_the_prompt() -> None:
    assert reviews.gold("the staff was not", "rude.") == 1.0
    assert reviews.gold("the staff was not", "good.") == 0.0
    assert reviews.gold("a waiter said good", "morning.") == 0.0


def test_about_half_of_the_grammar_is_positive() -> None:
    rng = random.Random(7)
    share = np.mean([sentiment(" ".join(review(rng))) > 0 for _ in range(3000)])
    assert 0.42 < share < 0.58


def test_prompts_are_disjoint_short_and_without_opinion() -> None:
    train, test = openings("train"), openings("test")
    assert (len(set(train)), len(set(test))) == (2000, 512)
    assert not set(train) & set(test)
    assert {len(split_words(text)) for text in train} == set(range(4, 11))
    assert not any(list(opinions(split_words(text))) for text in train + test)
    openings.cache_clear()
    assert openings("test") == test


def test_unknown_split_names_the_argument() -> None:
    with pytest.raises(
        InvalidArgument, match="split='validation' is not known; allowed: test, train"
    ):
        reviews.task(split="validation")


def test_tokenizer_round_trips() -> None:
    tokenizer, rng = bundled_tokenizer("reviews-lm"), random.Random(0)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert len(tokenizer) == len(vocabulary()) + 3
    for _ in range(300):
        words = review(rng)
        ids = tokenizer(" ".join(words))["input_ids"]
        text = tokenizer.decode(ids)
        assert len(ids) == len(words)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer(text)["input_ids"] == ids
        assert split_words(text) == words
        assert " ." not in text


def test_task_shares_its_frozen_models() -> None:
    first, second = reviews.task(split="test"), reviews.task(split="train", max_new_tokens=12)
    assert first.reference is second.reference
    assert first.scorer is second.scorer
    assert (first.max_new_tokens, second.max_new_tokens) == (40, 12)
    assert not any(p.requires_grad for p in first.reference.parameters())
    assert max(map(len, first.prompts)) <= first.max_prompt_tokens
    assert first.stop_token_ids == (1,)


@pytest.fixture(scope="module")
def samples() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of 512 fresh continuations: summed score, gold, finished."""
    task = reviews.task(split="test")
    torch.manual_seed(11)
    prompts = list(task.prompts)
    responses = sample(task.reference, prompts, task.max_new_tokens, 1)
    scores = summed_scores(task.scorer, prompts, responses)
    before, after = (
        task.tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (prompts, responses)
    )
    return (
        scores,
        np.array(list(map(reviews.gold, before, after))),
        np.array([r[-1] == 1 for r in responses]),
    )


def test_half_of_the_reference_is_positive_and_most_texts_finish(
    samples: tuple[np.ndarray, ...],
) -> None:
    _, gold, finished = samples
    assert 0.35 < gold.mean() < 0.65
    assert finished.mean() > 0.8


def test_summed_token_scores_tell_gold(samples: tuple[np.ndarray, ...]) -> None:
    scores, gold, _ = samples
    pairs = scores[gold == 1][:, None] - scores[gold == 0][None]
    assert (pairs > 0).mean() > 0.98
    assert ((scores > 0.9) == (gold == 1)).mean() > 0.92
    assert np.abs(scores).max() < 9


def test_texts_that_the_models_have_no_positions_for_are_refused() -> None:
    def make(max_new_tokens: int) -> Any:
        return gym.make_vec("tokenenv/Reviews-v0", num_envs=1, max_new_tokens=max_new_tokens)

    longest = make(40).unwrapped.token_spec.max_prompt_tokens
    with pytest.raises(InvalidArgument, match=rf"allowed: at most {256 - longest}\.$"):
        make(100_000)
    with pytest.raises(InvalidArgument, match="the reference has 256 positions"):
        make(257 - longest)
    assert make(256 - longest).unwrapped.token_spec.max_length == 256
