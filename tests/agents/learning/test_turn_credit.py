"""GAE with a lambda and a discount of its own from one turn to the next: by hand, and what it
equals."""

import itertools
import math
from typing import Any

import pytest
import tasks
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toy_env import ToyEnv

from tokenenv.agents import GRPO, PPO, RLOO
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.learning.advantages import (
    by_turn,
    gae,
    length_adaptive_lambda,
    returns_to_go,
    token_mask,
    turn_ends,
    unshaped,
)
from tokenenv.agents.learning.learner import state_values
from tokenenv.errors import InvalidArgument

# Row 0: two turns of two tokens. Row 1: three turns of one, the last of which was answered too.
POSITIONS = torch.tensor([[3, 4, 7, 8, 9], [2, 4, 7, 9, 0]])
LENGTHS = torch.tensor([4, 3])
BOOTSTRAPS = torch.tensor([False, True])


def test_a_turn_ends_where_something_was_written_behind() -> None:
    ends = turn_ends(POSITIONS)
    assert ends[0].tolist() == [False, True, False, False]
    assert ends[1, :3].tolist() == [True, True, True]


def test_two_numbers_by_turn() -> None:
    ends = torch.tensor([[False, True], [True, False]])
    assert by_turn(0.5, 1.0, ends).tolist() == [[0.5, 1.0], [1.0, 0.5]]
    assert by_turn(torch.tensor([0.25, 0.5]), 1.0, ends).tolist() == [[0.25, 1.0], [1.0, 0.5]]


def test_by_hand() -> None:
    """Within turns gamma and lambda are 0.5; from turn to turn gamma is 1 and lambda 0.5.

    Row 0 ends: deltas 1 + 0.5*2 - 1 = 1, 0 + 1*4 - 2 = 2, 2 + 0.5*2 - 4 = -1, 4 - 2 = 2. Row 1 goes
    on: deltas 1 + 2 - 0 = 3, 1 + 0 - 2 = -1, 1 + 4 - 0 = 5; its fourth column is not read.
    """
    rewards = torch.tensor([[1.0, 0.0, 2.0, 4.0], [1.0, 1.0, 1.0, torch.nan]])
    values = torch.tensor([[1.0, 2.0, 4.0, 2.0, 99.0], [0.0, 2.0, 0.0, 4.0, torch.nan]])
    ends = turn_ends(POSITIONS)
    gamma, lambda_ = by_turn(0.5, 1.0, ends), by_turn(0.5, 0.5, ends)
    found = gae(rewards, values, LENGTHS, BOOTSTRAPS, gamma, lambda_)
    expected = [
        [1 + 0.25 * (2 + 0.5 * (-1 + 0.25 * 2)), 2 + 0.5 * (-1 + 0.25 * 2), -1 + 0.25 * 2, 2],
        [3 + 0.5 * (-1 + 0.5 * 5), -1 + 0.5 * 5, 5, 0],
    ]
    assert found.tolist() == expected
    to_go = returns_to_go(rewards, LENGTHS, gamma)
    assert to_go.tolist() == [[1 + 0.5 * 4, 4, 4, 4], [3, 2, 1, 0]]


class Drawn:
    """Random texts of several turns, in float64."""

    def __init__(self, seed: int, texts: int = 3, width: int = 7) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(columns: int) -> Tensor:
            return torch.randn(texts, columns, generator=generator, dtype=torch.float64)

        self.rewards, self.values = normal(width), normal(width + 1)
        self.lengths = torch.randint(1, width + 1, (texts,), generator=generator)
        self.bootstraps = torch.rand(texts, generator=generator) < 0.5
        places = torch.randint(1, 3, (texts, width + 1), generator=generator).cumsum(1)
        self.ends = turn_ends(places)
        self.mask = token_mask(self.lengths, width)

    def gae(self, gamma: float | Tensor, lambda_: float | Tensor) -> Tensor:
        return gae(self.rewards, self.values, self.lengths, self.bootstraps, gamma, lambda_)


drawn = given(
    seed=st.integers(0, 10**6),
    gamma=st.sampled_from([1.0, 0.9, 0.5]),
    across=st.sampled_from([1.0, 0.7]),
    lambda_=st.floats(0.0, 1.0),
)
few = settings(deadline=None, max_examples=30)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@few
@drawn
def test_equal_numbers_and_a_single_turn_are_plain_gae(
    seed: int, gamma: float, across: float, lambda_: float
) -> None:
    d = Drawn(seed)
    equal = d.gae(by_turn(gamma, gamma, d.ends), by_turn(lambda_, lambda_, d.ends))
    close(equal, d.gae(gamma, lambda_))
    never = torch.zeros_like(d.ends)
    close(d.gae(by_turn(gamma, across, never), by_turn(lambda_, across, never)), equal)


@few
@drawn
def test_with_ones_within_a_turn_is_one_action(
    seed: int, gamma: float, across: float, lambda_: float
) -> None:
    """At each turn's first token the estimate is that of GAE over turns, which earn the sum of their
    tokens' rewards. At a later one it is the same with the value of its own state, and without what
    the turn has earned before it."""
    d = Drawn(seed)
    found = d.gae(by_turn(1.0, across, d.ends), by_turn(1.0, lambda_, d.ends))
    for row, length in enumerate(d.lengths.tolist()):
        cuts = [0, *(t + 1 for t in range(length - 1) if d.ends[row, t]), length]
        starts = cuts[:-1]
        spans = itertools.pairwise(cuts)
        earned = torch.stack([d.rewards[row, a:b].sum() for a, b in spans])[None]
        # A text that is cut within a turn bootstraps with the discount within turns, which is 1.
        last = 1.0 if d.ends[row, length - 1] else 1 / across
        values = torch.cat([d.values[row, starts], last * d.values[row, [length]]])[None]
        count, goes_on = torch.tensor([len(starts)]), d.bootstraps[[row]]
        whole = gae(earned, values, count, goes_on, across, lambda_)[0]
        close(found[row, starts], whole)
        for t in range(length):
            k = sum(start <= t for start in starts) - 1
            before = d.rewards[row, starts[k] : t].sum() + d.values[row, t]
            close(found[row, t], whole[k] + d.values[row, starts[k]] - before)


@few
@drawn
def test_a_shifted_critic_is_shaping_whatever_turns_weigh(
    seed: int, gamma: float, across: float, lambda_: float
) -> None:
    d = Drawn(seed)
    potential = torch.randn(d.values.shape, generator=torch.Generator().manual_seed(seed)).double()
    potential[~d.bootstraps, d.lengths[~d.bootstraps]] = 0.0
    gammas, lambdas = by_turn(gamma, across, d.ends), by_turn(lambda_, across, d.ends)
    shaped = d.rewards + gammas * potential[:, 1:] - potential[:, :-1]
    ends = d.lengths, d.bootstraps, gammas, lambdas
    close(gae(shaped, d.values - potential, *ends), d.gae(gammas, lambdas))
    close(unshaped(shaped, potential, d.lengths, gammas) * d.mask, d.rewards * d.mask)


def test_lambdas_of_one_are_returns_whatever_the_values() -> None:
    d = Drawn(1)
    never = d.lengths < 0
    found = gae(d.rewards, d.values, d.lengths, never, 1.0, by_turn(1.0, 1.0, d.ends))
    expected = returns_to_go(d.rewards, d.lengths, 1.0) - d.values[:, :-1]
    close(found, expected * d.mask)


# ---------------------------------------------------------------- in an agent


def estimates(**config: Any) -> tuple[PPO, EpisodeBatch, Tensor]:
    """A PPO on texts that an environment writes into, some of which are cut without a score, its
    first batch, and the advantages in it."""
    shaped = {"reward": "delta", "scorer": "sequence", "score_truncated": False}
    envs = tasks.make_vec(4, "SameStep", turns="fixed", **shaped)
    agent = PPO(envs, scale_rewards=False, whiten=False, seed=3, **config)
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(agent.policy.value_head.weight, std=0.1, generator=generator)
    batch = EpisodeBatch.stack(agent.collector.collect(150))
    return agent, batch, agent.advantages(batch)


def test_ppo_weighs_turns_and_tokens_apart() -> None:
    agent, batch, found = estimates(lambda_actor=0.5, lambda_turn=0.9)
    ends, mask = turn_ends(batch.position_BT1), batch.mask_BT
    last = torch.arange(mask.shape[1]) == batch.response_length_B[:, None] - 1
    assert (ends & mask & ~last).sum() > 5
    assert {bool(b) for b in batch.bootstraps_B} == {True, False}
    values = state_values(agent.policy, batch, 10_000)
    known = batch.response_length_B, batch.bootstraps_B, 1.0
    lambdas = torch.where(ends, 0.9, 0.5)
    torch.testing.assert_close(agent.policy_lambda(batch)[mask], lambdas[mask])
    expected = gae(agent.rewards(batch), values, *known, lambdas)
    torch.testing.assert_close(found[mask], expected[mask])
    # The critic's targets have a lambda of their own, whatever turns there are.
    targets = values[:, :-1] + gae(agent.rewards(batch), values, *known, 0.95)
    torch.testing.assert_close(batch.learned["target"][mask], targets[mask])
    plain, same = estimates(lambda_actor=0.5)[2], estimates(lambda_actor=0.5, lambda_turn=0.5)[2]
    torch.testing.assert_close(same, plain)
    assert (found - plain)[mask].abs().max() > 0.05


def test_with_an_adaptive_lambda_turns_keep_their_own() -> None:
    agent, batch, _ = estimates(lambda_alpha=1.0, lambda_turn=0.25)
    ends, mask = turn_ends(batch.position_BT1), batch.mask_BT
    within = length_adaptive_lambda(batch.response_length_B, 1.0)[:, None]
    found = agent.policy_lambda(batch)
    torch.testing.assert_close(found[mask], torch.where(ends, 0.25, within)[mask])


def test_a_critic_that_is_given_the_potential_changes_no_advantage() -> None:
    options = {"lambda_actor": 0.5, "lambda_turn": 0.9}
    (_, batch, found), (_, _, shifted) = (
        estimates(critic_offset=offset, **options) for offset in (None, "potential")
    )
    assert batch.potential_BT1.abs().max() > 0.1
    torch.testing.assert_close(shifted[batch.mask_BT], found[batch.mask_BT], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [(PPO, {"lambda_turn": 0.9}), (RLOO, {"baseline": "turn"}), (GRPO, {"baseline": "turn"})],
)
def test_agents_learn_by_turns_where_there_are_any(algorithm: Any, options: Any) -> None:
    """And where there are none: then every text is one turn."""
    for turns in ("random", None):
        task = {"reward": {"end": "terminal", "moves": "delta"}, "turns": turns}
        envs = tasks.make_vec(4, "SameStep", group_size=2, **task)
        seen: list[dict[str, float]] = []
        agent = algorithm(envs, batch_tokens=40, **options)
        agent.learn(80, on_update=lambda metrics, episodes, seen=seen: seen.append(metrics))
        assert seen
        assert all(math.isfinite(metrics["loss/policy"]) for metrics in seen)


def test_a_lambda_of_turns_is_a_share() -> None:
    with pytest.raises(InvalidArgument, match=r"lambda_turn=1.5 is not allowed; it must lie"):
        PPO(ToyEnv(2), lambda_turn=1.5)
