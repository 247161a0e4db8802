"""Credit from what the score loses without parts of the text: occlusion and Shapley values."""

from itertools import combinations
from math import comb, factorial
from typing import Any

import credit
import numpy as np
import pytest
from credit import SCORERS, T, Words, close, placed
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenenv.models.prefix_scores import score_texts
from tokenenv.rewards.occlusion import Occlusion
from tokenenv.rewards.redistribute import distinct_scores
from tokenenv.rewards.shapley import Shapley

PAIRS, UNPAID = credit.texts()


def test_equal_texts_are_scored_once():
    seen = []
    scorer = Words(
        lambda prompt, response: (
            seen.append((tuple(prompt), tuple(response))) or 10 * len(prompt) + len(response)
        )
    )
    texts = [([3], [4, 5]), ([3, 4], [5]), ([3], [4, 5]), ([3], [])]
    assert distinct_scores(scorer, texts, 100).tolist() == [12, 21, 12, 10]
    assert len(seen) == len(set(seen)) == 3


@pytest.mark.parametrize("scorer", SCORERS)
def test_occlusion_is_the_loss_of_each_token_and_the_rest_on_the_last(scorer):
    scorer = SCORERS[scorer]()
    rewards = placed(Occlusion(), scorer, PAIRS, UNPAID)
    for row, ((prompt, response), prefix_length) in enumerate(zip(PAIRS, UNPAID, strict=True)):
        score = one(scorer, prompt, response)
        expected = [
            score - one(scorer, prompt, response[:t] + response[t + 1 :])
            for t in range(len(response))
        ]
        expected[:prefix_length] = [0.0] * prefix_length
        expected[-1] += score - sum(expected)
        close(rewards[row, : len(response)], expected)


def one(scorer: Any, prompt: list[int], response: list[int]) -> float:
    return float(score_texts(scorer, [(prompt, response)]))


def test_tokens_that_count_for_themselves_get_what_they_count():
    scorer = Words(lambda prompt, response: sum(token / 7 for token in response))
    rewards = placed(Occlusion(), scorer, PAIRS, [0] * len(PAIRS))
    own = [[token / 7 for token in response] + [0.0] * (T - len(response)) for _, response in PAIRS]
    close(rewards, own)
    close(placed(Shapley(max_segments=T), scorer, PAIRS, [0] * len(PAIRS)), own)


def exact_shapley(
    scorer: Any, prompt: list[int], response: list[int], prefix_length: int, segments: int
) -> np.ndarray:
    """(T,) by the definition: every coalition's gain, weighted by the share of orders in which it
    is met."""
    players = np.array_split(
        np.arange(prefix_length, len(response)), min(segments, len(response) - prefix_length)
    )
    everyone, values = range(len(players)), np.zeros(T)

    def worth(coalition):
        kept = [
            t
            for t in range(len(response))
            if t < prefix_length or any(t in players[i] for i in coalition)
        ]
        return one(scorer, prompt, [response[t] for t in kept])

    for player in everyone:
        others = [i for i in everyone if i != player]
        for size in range(len(players)):
            weight = 1 / (len(players) * comb(len(others), size))
            for coalition in combinations(others, size):
                values[players[player]] += (
                    weight * (worth({*coalition, player}) - worth(coalition)) / len(players[player])
                )
    return values


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("segments", [1, 2, 3, 4])
def test_shapley_values_are_exact_where_all_orders_are_walked(scorer, segments):
    scorer = SCORERS[scorer]()
    rewards = placed(Shapley(segments, factorial(max(segments, 2))), scorer, PAIRS, UNPAID)
    for row, ((prompt, response), prefix_length) in enumerate(zip(PAIRS, UNPAID, strict=True)):
        close(rewards[row], exact_shapley(scorer, prompt, response, prefix_length, segments))


def test_drawn_orders_come_close_to_the_exact_values():
    scorer, (prompt, response) = SCORERS["automaton"](), PAIRS[0]
    exact = exact_shapley(scorer, prompt, response, 0, 5)
    error = [
        np.abs(placed(Shapley(5, n), scorer, [(prompt, response)], [0])[0].numpy() - exact).max()
        for n in (2, 10, 118)
    ]
    assert error[0] > error[1] > error[2]
    assert error[2] < 0.05 * np.abs(exact).max() < error[0]


def test_drawn_orders_have_the_exact_values_as_their_mean():
    """The same game on many texts, whose orders are drawn apart."""
    texts = [([a, b], list(range(10, 15))) for a in range(3, 43) for b in range(3, 43)]
    game = np.random.default_rng(0).normal(size=1024)
    scorer = Words(
        lambda prompt, response: float(game[sum(1 << (token - 10) for token in response)])
    )
    rewards = placed(Shapley(5, 2), scorer, texts, [0] * len(texts)).numpy()
    error = rewards.mean(0) - exact_shapley(scorer, *texts[0], 0, 5)
    assert (rewards.std(0)[:5] > 0.1).all()
    assert (np.abs(error) <= 4 * rewards.std(0) / len(texts) ** 0.5).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999), st.integers(2, T))
def test_an_order_and_its_reverse_are_exact_for_pairwise_games(seed, segments):
    """What two players add together is split by any order and its reverse."""
    rng = np.random.default_rng(seed)
    single, pair = rng.normal(size=99), np.triu(rng.normal(size=(99, 99)), 1)
    response = rng.permutation(np.arange(3, 60))[:segments].tolist()

    def score(prompt, kept):
        return float(sum(single[kept]) + sum(pair[a, b] for a, b in combinations(sorted(kept), 2)))

    rewards = placed(Shapley(segments, 2), Words(score), [([5], response)], [0])[0, :segments]
    close(
        rewards,
        [single[a] + (pair[a, response].sum() + pair[response, a].sum()) / 2 for a in response],
    )


def test_equal_players_are_paid_equally_and_idle_ones_nothing():
    """Token 7 counts once however often it occurs, 8 adds to each 9, 3 does nothing; two tokens a
    segment."""
    scorer = Words(lambda prompt, kept: 2.0 * (7 in kept) + kept.count(8) * kept.count(9) / 4)
    rewards = placed(Shapley(4, 24), scorer, [([5], [7, 3, 3, 3, 8, 9, 3, 7])], [0])[0]
    close(rewards, [0.5, 0.5, 0, 0, 0.125, 0.125, 0.5, 0.5, 0])
