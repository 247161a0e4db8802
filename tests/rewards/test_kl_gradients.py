"""Which forms of the KL penalty have the gradient of E[score - beta KL], by enumeration of every
text of a small world."""

import numpy as np
import pytest
import torch
from tabular import BETA, World, relative_error, to_go, worlds
from torch import Tensor

from tokenenv.agents.learning.advantages import kl_penalised
from tokenenv.agents.learning.token_stats import token_stats

HOLDS, BROKEN = 1e-5, 0.1
each_world = pytest.mark.parametrize("world", worlds(), ids=lambda world: f"seed{world.seed}")


def found_gradient(world: World, rewards: Tensor | np.ndarray) -> Tensor:
    """What reward-to-go follows."""
    return world.policy_gradient(to_go(rewards))


def paid_by_env(world: World, kl: str, estimator: str = "k1") -> Tensor:
    """Rewards (B, T) with the env's KL term, of texts sampled from the world's policy."""
    envs = world.env(reward="terminal", kl=kl, kl_estimator=estimator, kl_coef=BETA)
    rows = zip(world.logprob(world.policy), world.length, strict=True)
    logprobs = [row[:length].tolist() for row, length in rows] if kl == "policy" else None
    return torch.from_numpy(world.score(envs, logprobs=logprobs).token_rewards).double()


def full_kl(world: World, logits: Tensor) -> Tensor:
    """KL(pi || pi_ref) (B, T) over the whole vocabulary, in the state before each token, as the
    agents compute it."""
    before, tokens = world.before.flatten(), world.tokens.flatten()
    reference = world.reference.head(before)
    stats = token_stats(
        logits[before],
        tokens,
        lambda x: x,
        logits.shape[1],
        ref_states_KH=reference,
        ref_head=lambda x: x,
    )
    return stats.kl.view_as(world.before) * world.mask


@each_world
def test_k1_paid_by_the_env_is_exact(world: World) -> None:
    assert (
        relative_error(
            found_gradient(world, paid_by_env(world, "policy")), world.objective_gradient()
        )
        < HOLDS
    )


@each_world
def test_both_halves_of_k1_together_are_exact_and_the_envs_alone_is_not(world: World) -> None:
    half = paid_by_env(world, "reference")
    whole = kl_penalised(half, world.logprob(world.policy), torch.full((len(half),), BETA))
    assert relative_error(found_gradient(world, whole), world.objective_gradient()) < HOLDS
    assert relative_error(found_gradient(world, half), world.objective_gradient()) > BROKEN


@each_world
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_k2_and_k3_follow_another_gradient(world: World, estimator: str) -> None:
    rewards = paid_by_env(world, "policy", estimator)
    assert relative_error(found_gradient(world, rewards), world.objective_gradient()) > BROKEN


@each_world
def test_k3_is_unbiased_as_a_number(world: World) -> None:
    """Its mean is the KL, and still its gradient as a reward is wrong."""
    probs = world.logprob(world.policy).sum(1).exp()
    k1, k2, k3 = (
        probs @ paid_by_env(world, "policy", estimator).sum(1) for estimator in ("k1", "k2", "k3")
    )
    torch.testing.assert_close(k3, k1, rtol=1e-5, atol=1e-5)
    assert abs(k2 - k1) > 0.01


@each_world
def test_full_vocabulary_kl_needs_future_penalties_and_the_present_one_differentiated(
    world: World,
) -> None:
    """As a reward it never reaches the token that causes it; as a loss it ignores what the token
    leads to."""
    score, penalty = world.rewards(per_token=False), BETA * full_kl(world, world.policy)
    exact, credit = world.objective_gradient(), to_go(score - penalty)

    def own(logits: Tensor) -> Tensor:
        return -BETA * full_kl(world, logits).sum(1)

    assert relative_error(world.policy_gradient(credit, own), exact) < HOLDS
    assert relative_error(world.policy_gradient(credit), exact) > BROKEN
    assert relative_error(world.policy_gradient(to_go(score), own), exact) > BROKEN
