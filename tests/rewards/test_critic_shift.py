"""Shaping is a critic shifted by the potential: the same rewards, the same advantages for every
lambda, the same update."""

from typing import Any

import pytest
import tasks
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tabular import STOP, World
from torch import Tensor

from tokenenv.agents import PPO
from tokenenv.agents.algorithms import ppo
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.learning.advantages import gae, unshaped
from tokenenv.rewards.seen import States
from tokenenv.rewards.shaping import Shaping

WORLD = World(7, stops=(STOP,))
both_scorers = pytest.mark.parametrize("scorer", ["sequence", "token"])
both_ends = pytest.mark.parametrize("score_truncated", [True, False])


def prefix_score(states: States) -> Tensor:
    """Phi = f, given as anyone would give it."""
    assert states.score is not None
    return states.score


def paid(scorer: str, score_truncated: bool, reward: Any) -> Tensor:
    """(B, T) float64: what an env pays for each token of all texts, of lengths 1 to T."""
    rewards = WORLD.paid(scorer, reward=reward, score_truncated=score_truncated).token_rewards
    return torch.from_numpy(rewards).double()


def scored(score_truncated: bool) -> Tensor:
    """(B,) bool: texts after which learners do not bootstrap."""
    return ~WORLD.truncated | score_truncated


def terminal(scorer: str, score_truncated: bool) -> Tensor:
    """(B, T): the score on the last token, where it is due."""
    score = WORLD.rewards(per_token=scorer == "token").sum(1) * scored(score_truncated)
    return score[:, None] * WORLD.final


def potential(scorer: str, score_truncated: bool) -> Tensor:
    """(B, T + 1): f before each token and at the end, where it stays only if learners bootstrap
    there."""
    phi = WORLD.prefix_scores(per_token=scorer == "token")
    phi[scored(score_truncated), WORLD.length[scored(score_truncated)]] = 0.0
    return phi


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@both_scorers
@both_ends
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_shaping_is_terminal_plus_the_difference_of_the_potential(
    scorer: str, score_truncated: bool, gamma: float
) -> None:
    phi, base = potential(scorer, score_truncated), terminal(scorer, score_truncated)
    expected = base + (gamma * phi[:, 1:] - phi[:, :-1]) * WORLD.mask
    close(paid(scorer, score_truncated, "terminal"), base)
    close(paid(scorer, score_truncated, Shaping(gamma=gamma)), expected)
    close(paid(scorer, score_truncated, Shaping(prefix_score, gamma=gamma)), expected)
    if gamma == 1.0:
        close(paid(scorer, score_truncated, "delta"), expected)


@both_scorers
@both_ends
@settings(deadline=None, max_examples=40)
@given(
    lambda_=st.floats(0.0, 1.0),
    gamma=st.just(1.0) | st.floats(0.0, 1.0),
    seed=st.integers(0, 2**31),
)
def test_shaped_rewards_and_a_shifted_critic_give_the_same_advantages(
    scorer: str, score_truncated: bool, lambda_: float, gamma: float, seed: int
) -> None:
    values = torch.randn(
        WORLD.mask.shape[0], WORLD.mask.shape[1] + 1, generator=torch.Generator().manual_seed(seed)
    ).double()
    ends = (WORLD.length, ~scored(score_truncated), gamma, lambda_)
    shaped = gae(paid(scorer, score_truncated, Shaping(gamma=gamma)), values, *ends)
    shifted = gae(
        terminal(scorer, score_truncated), values + potential(scorer, score_truncated), *ends
    )
    close(shaped, shifted)


@both_scorers
@both_ends
def test_the_shaping_comes_out_of_the_rewards_again(scorer: str, score_truncated: bool) -> None:
    phi = potential(scorer, score_truncated)
    for gamma, reward in ((1.0, "delta"), (0.9, Shaping(gamma=0.9))):
        base = unshaped(paid(scorer, score_truncated, reward), phi, WORLD.length, gamma)
        close(base, terminal(scorer, score_truncated))


class Update:
    """What one PPO update on the first episodes of an env learns from; `shift` (B, T + 1) is added
    to its critic."""

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        reward: Any,
        score_truncated: bool,
        shift: Any = 0.0,
        **config: Any,
    ) -> None:
        own = ppo.values_before
        envs = tasks.make_vec(
            4, "SameStep", reward=reward, scorer="sequence", score_truncated=score_truncated
        )
        agent = PPO(
            envs,
            scale_rewards=False,
            whiten=False,
            lambda_actor=0.7,
            lambda_critic=0.3,
            seed=3,
            **config,
        )
        torch.nn.init.normal_(
            agent.policy.value_head.weight, std=0.1, generator=torch.Generator().manual_seed(0)
        )
        self.batch = EpisodeBatch.stack(agent.collector.collect(80))
        with patch.context() as inner:
            inner.setattr(ppo, "values_before", lambda *args: own(*args) + shift)
            inner.setattr(agent, "optimise", lambda batch, make_loss: {})
            agent.update(self.batch)
        self.advantages, self.targets = (
            self.batch.learned[name] for name in ("advantage", "target")
        )


@both_ends
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_ppo_learns_the_same_from_both(
    monkeypatch: pytest.MonkeyPatch, score_truncated: bool, gamma: float
) -> None:
    shaping = "delta" if gamma == 1.0 else Shaping(gamma=gamma)
    shaped = Update(monkeypatch, shaping, score_truncated, gamma=gamma)
    offset = Update(monkeypatch, shaping, score_truncated, gamma=gamma, critic_offset="potential")
    phi = shaped.batch.potential_BT1
    assert {bool(cut) for cut in shaped.batch.truncated_B} == {True, False}
    shifted = Update(monkeypatch, "terminal", score_truncated, shift=phi, gamma=gamma)
    for other in (offset, shifted):
        assert torch.equal(other.batch.tokens_BL, shaped.batch.tokens_BL)
        torch.testing.assert_close(other.advantages, shaped.advantages, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(offset.targets, shaped.targets, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(shifted.targets, shaped.targets + phi[:, :-1], atol=1e-6, rtol=1e-5)
    plain = Update(monkeypatch, "terminal", score_truncated, gamma=gamma)
    assert (plain.advantages - shaped.advantages).abs().max() > 0.1
