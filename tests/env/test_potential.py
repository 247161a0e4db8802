"""Potentials on their way from the env to the critic, and the warning about designs that bias
reward-to-go."""

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from tasks import MODES, make_vec, reference

from tokenenv.agents import PPO, LMPolicy
from tokenenv.agents.episodes import Episode, EpisodeBatch
from tokenenv.agents.learning.advantages import unshaped
from tokenenv.agents.rollout.actor import Actor
from tokenenv.agents.rollout.collector import Collector
from tokenenv.errors import InvalidArgument
from tokenenv.rewards import Process, Segment, Shaping


def collected(mode: Any, **options: Any) -> list[Episode]:
    envs = make_vec(4, mode, kl="none", **options)
    return Collector(envs, Actor(LMPolicy(copy.deepcopy(reference())), seed=3)).collect(120)


@pytest.mark.parametrize("score_truncated", [True, False])
@pytest.mark.parametrize("gamma", [1.0, 0.8])
@pytest.mark.parametrize("mode", MODES)
def test_taking_the_shaping_out_leaves_the_terminal_reward(
    mode: Any, gamma: float, score_truncated: bool
) -> None:
    """Episodes carry Phi of every state in every autoreset mode, and zero where learners do not
    bootstrap."""
    options = {"scorer": "sequence", "score_truncated": score_truncated}
    episodes = collected(mode, reward=Shaping(gamma=gamma), **options)
    assert {e.truncated for e in episodes} == {True, False}
    batch = EpisodeBatch.stack(episodes)
    base = unshaped(batch.reward_BT, batch.potential_BT1, batch.response_length_B, gamma)
    expected = torch.zeros_like(base)
    scored = batch.terminated_B | score_truncated
    last = batch.response_length_B - 1
    expected[torch.arange(len(batch)), last] = torch.where(scored, batch.score_B, 0.0).float()
    torch.testing.assert_close(base, expected, atol=1e-5, rtol=1e-5)
    kept = batch.potential_BT1[torch.arange(len(batch)), last + 1]
    assert torch.equal(kept == 0, scored)


@pytest.mark.parametrize("score_truncated", [True, False])
@pytest.mark.parametrize("reward", [Segment(3.4), Process("delta")], ids=["segment", "process"])
def test_a_potential_read_at_cuts_comes_out_of_the_rewards_too(
    reward: Any, score_truncated: bool
) -> None:
    options = {
        "scorer": "sequence",
        "score_truncated": score_truncated,
        "step_ends": tuple(range(20, 40)),
    }
    batch = EpisodeBatch.stack(collected("SameStep", reward=reward, **options))
    base = unshaped(batch.reward_BT, batch.potential_BT1, batch.response_length_B, 1.0)
    due = torch.where(batch.terminated_B | score_truncated, batch.score_B, 0.0).float()
    torch.testing.assert_close(base.sum(1), due, atol=1e-5, rtol=1e-5)
    inside = batch.mask_BT & (torch.arange(base.shape[1]) < batch.response_length_B[:, None] - 1)
    assert base[inside].abs().max() < 1e-5
    assert (
        batch.potential_BT1[:, 1:-1][inside[:, :-1]].diff() == 0
    ).any()  # not every token is a cut


def test_the_potential_is_the_prefix_score() -> None:
    episodes = collected("SameStep", reward="delta", scorer="sequence")
    envs = make_vec(1, reward="terminal", scorer="sequence")
    for episode in episodes[:5]:
        prefixes = [episode.response[: t + 1] for t in range(len(episode.response) - 1)]
        if prefixes:
            scores = envs.unwrapped.score_episodes([episode.prompt] * len(prefixes), prefixes).score
            np.testing.assert_allclose(episode.potential[1:-1], scores, atol=1e-5)
        assert episode.potential[-1] == 0


def test_an_env_without_a_potential_has_nothing_to_offset() -> None:
    agent = PPO(
        make_vec(4, "SameStep", reward="terminal"), batch_tokens=16, critic_offset="potential"
    )
    with pytest.raises(
        InvalidArgument, match=r"critic_offset='potential' needs .* such as 'delta'"
    ):
        agent.learn(32)
    with pytest.raises(InvalidArgument, match="critic_offset='potentials' is not known"):
        PPO(make_vec(4, "SameStep"), critic_offset="potentials")


def test_a_potential_that_is_zero_is_one() -> None:
    """A sparse score, or a schedule that has not begun."""
    for reward in (
        Shaping(lambda states: torch.zeros(states.step.shape)),
        {"later": ("delta", 0.0), "now": "terminal"},
    ):
        PPO(
            make_vec(4, "SameStep", reward=reward), batch_tokens=16, critic_offset="potential"
        ).learn(32)


def test_the_critic_takes_the_potential_without_a_change_to_the_advantages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Shaped rewards, and unshaped ones with an offset critic, give the same advantages and critic
    targets."""
    seen = []
    monkeypatch.setattr(PPO, "optimise", lambda self, batch, make_loss: {})
    for offset in (None, "potential"):
        envs = make_vec(4, "SameStep", reward="delta", scorer="sequence", score_truncated=False)
        agent = PPO(
            envs,
            critic_offset=offset,
            scale_rewards=False,
            whiten=False,
            lambda_actor=0.7,
            lambda_critic=0.3,
        )
        torch.nn.init.constant_(agent.policy.value_head.bias, 0.3)
        batch = EpisodeBatch.stack(agent.collector.collect(150))
        agent.update(batch)
        seen.append((batch.learned["advantage"], batch.learned["target"]))
    (advantages, targets), (offset_advantages, offset_targets) = seen
    assert advantages.abs().max() > 0.1
    torch.testing.assert_close(offset_advantages, advantages, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(offset_targets, targets, atol=1e-6, rtol=1e-5)


def test_a_biased_design_is_named_once() -> None:
    with pytest.warns(UserWarning, match="reward-to-go on 'shares' does not estimate .*'delta'"):
        PPO(make_vec(2, reward={"dense": "token", "shares": "uniform"}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PPO(make_vec(2, reward={"a": "token", "b": "delta", "c": "terminal"}))
