"""What reward terms learn is what they would learn of the texts of all processes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranked import agent_of

from tokenenv import ranks
from tokenenv.errors import InvalidArgument
from tokenenv.rewards import PositionScaled, Prime, Scaled
from tokenenv.rewards.scaling import since, together, updated_moments


def moments_of(values):
    values = torch.tensor(values, dtype=torch.float64)
    bins, mask = torch.zeros(len(values), dtype=torch.int64), torch.ones(len(values), dtype=bool)
    return updated_moments(torch.zeros(3, 1, dtype=torch.float64), values, bins, mask)


numbers = st.lists(st.floats(-100, 100), max_size=8)


@given(numbers, numbers, numbers)
def test_moments_are_those_of_all_values(first, second, third):
    both = together(moments_of(first), moments_of(second))
    assert torch.allclose(both, moments_of(first + second), atol=1e-6)
    more = moments_of(first + third)
    assert torch.allclose(since(moments_of(first), more), moments_of(third), atol=1e-6)
    joined = together(
        together(moments_of(first), since(moments_of(first), both)), moments_of(third)
    )
    assert torch.allclose(joined, moments_of(first + second + third), atol=1e-6)


def learned(term):
    """What a term has learned after some updates, what ranks last told each other, and the tokens
    that this rank has seen."""
    agent = agent_of("ppo", options={"reward": term})
    agent.learn(10**6, on_update=lambda *_: agent.stop() if agent.updates == 3 else None)
    [saved] = agent.core.save_statistics().values()
    return saved, agent.joined, agent.collector.tokens_seen


@pytest.mark.parametrize("wrapper", [Scaled, PositionScaled])
def test_scales_are_those_of_all_ranks(on_ranks, wrapper):
    (first, joined, tokens), (second, joined_too, tokens_too) = on_ranks(
        2, learned, wrapper("token")
    )
    assert np.array_equal(first, second)
    assert first[0].sum() == tokens + tokens_too  # each token of each rank counts once
    assert all(np.array_equal(one, first) for part in (joined, joined_too) for one in part.values())


def test_a_reward_model_that_learns_online_is_one_on_all_ranks(on_ranks):
    parts = on_ranks(2, learned, Prime(outcome="score", threshold=0.0, every=8, lr=1e-2))
    (first, _, _), (second, _, _) = parts
    assert first["counts"][0] == second["counts"][0] > 1
    for name, weight in first["weights"].items():
        assert np.array_equal(weight, second["weights"][name])


class Private(Scaled):
    join = type(Scaled("token")).__mro__[3].join


def refused():
    with pytest.raises(InvalidArgument, match=r"Private must define join\(before, parts\)"):
        agent_of("ppo", options={"reward": Private("token")})
    return ranks.number()


def test_a_term_that_cannot_join_is_refused(on_ranks):
    assert on_ranks(2, refused) == [0, 1]
    agent_of("ppo", options={"reward": Private("token")})  # alone it may learn as it likes
