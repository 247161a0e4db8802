"""The exact optimum of score - beta KL, by enumeration, and the dense rewards that are read off
it."""

import copy

import pytest
import torch
from tabular import BETA, NUM_HISTORIES, Tabular, V, World, relative_error, to_go, worlds
from torch import Tensor

from tokenenv.rewards.implicit import Implicit
from tokenenv.rewards.shaping import Oracle

each_world = pytest.mark.parametrize("world", worlds(), ids=lambda world: f"seed{world.seed}")
both_scorers = pytest.mark.parametrize("scorer", ["sequence", "token"])


def rewards_of(world: World, scorer: str) -> Tensor:
    """r (B, T)."""
    return world.rewards(per_token=scorer == "token")


def optimal_policy(world: World, scorer: str) -> Tensor:
    """log pi* (histories, V), from whole texts: pi*(y) = pi_ref(y) exp(R(y) / beta) / Z, summed
    over all that go on alike."""
    weight = (
        (world.logprob(world.reference.logprobs) + rewards_of(world, scorer) / BETA).sum(1).exp()
    )
    mass = torch.zeros(NUM_HISTORIES, V, dtype=torch.float64)
    mass.index_put_((world.before, world.tokens), weight[:, None] * world.mask, accumulate=True)
    logprobs = (mass / mass.sum(1, keepdim=True)).log()
    return torch.where(mass > 0, logprobs, world.reference.logprobs)


def soft_values(world: World, rewards: Tensor, at_end: Tensor, beta: float = BETA) -> Tensor:
    """V* (histories,) by the soft Bellman equation; `rewards` on arriving at a history, `at_end`
    that of finished texts."""
    values, finished = at_end.clone(), set(world.after[world.final].tolist())
    for history in reversed(range((NUM_HISTORIES - 1) // V)):
        if history not in finished:
            onward = (rewards + values)[V * history + 1 : V * history + 1 + V]
            values[history] = beta * (world.reference.logprobs[history] + onward / beta).logsumexp(
                0
            )
    return values


def by_history(world: World, values: Tensor, where: Tensor) -> Tensor:
    """`values` (B, T) as a table of the histories after the tokens `where`; 0 in the others."""
    return torch.zeros(NUM_HISTORIES, dtype=torch.float64).index_put(
        (world.after[where],), values[where]
    )


def advantages(world: World, scorer: str) -> Tensor:
    """r + V*(s') - V*(s) (B, T), with V* of what is still to come."""
    rewards = rewards_of(world, scorer)
    values = soft_values(
        world,
        by_history(world, rewards, world.mask),
        torch.zeros(NUM_HISTORIES, dtype=torch.float64),
    )
    return rewards + (values[world.after] - values[world.before]) * world.mask


def whole_values(world: World, scorer: str, beta: float) -> Tensor:
    """V* (histories,) of the whole score, as an oracle gives it: after the last token it is the
    score."""
    score = rewards_of(world, scorer).sum(1, keepdim=True).expand_as(world.mask)
    return soft_values(
        world, torch.zeros(NUM_HISTORIES), by_history(world, score, world.final), beta
    )


@each_world
@both_scorers
def test_the_log_ratio_of_the_optimum_is_the_soft_advantage(world: World, scorer: str) -> None:
    log_ratio = world.logprob(optimal_policy(world, scorer)) - world.logprob(
        world.reference.logprobs
    )
    torch.testing.assert_close(BETA * log_ratio, advantages(world, scorer), rtol=0, atol=1e-12)


@each_world
def test_no_direction_leads_up_from_the_optimum(world: World) -> None:
    best = copy.copy(world)
    best.policy = optimal_policy(world, "sequence")
    assert best.objective_gradient().abs().max() < 1e-12
    assert world.objective_gradient().abs().max() > 0.01


@each_world
@both_scorers
def test_implicit_and_oracle_pay_the_soft_advantage_and_keep_return_and_gradient(
    world: World, scorer: str
) -> None:
    """An implicit reward does so at the optimum only; see test_preservation.py for any other
    model."""
    score = rewards_of(world, scorer).sum(1)
    start = whole_values(world, scorer, BETA)[0]
    for term in (Implicit(), Oracle()):
        envs = world.env(
            scorer,
            reward=term,
            kl_coef=BETA,
            implicit_model=Tabular(optimal_policy(world, scorer)),
            oracle=lambda beta: whole_values(world, scorer, beta),
        )
        paid = torch.from_numpy(world.score(envs).terms[term.name]).double()
        torch.testing.assert_close(paid, advantages(world, scorer), rtol=0, atol=1e-5)
        torch.testing.assert_close(paid.sum(1), score - start, rtol=0, atol=1e-5)
        exact = world.gradient_of_mean(lambda logprob: score)
        assert relative_error(world.policy_gradient(to_go(paid)), exact) < 1e-5
