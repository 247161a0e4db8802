"""What each reward design keeps, the return and the policy gradient, by enumeration of every text
of small worlds: where the policy alone writes, and where an environment answers at random."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from tabular import BETA, SCORERS, World, relative_error, to_go, worlds
from torch import Tensor
from turn_world import turn_worlds

from tokenenv.rewards.designs import DESIGNS, RewardSpec, make_terms
from tokenenv.rewards.process import FORMS, Process
from tokenenv.rewards.rule import Rule
from tokenenv.rewards.seen import FinishedTexts
from tokenenv.rewards.segment import Segment
from tokenenv.rewards.shaping import Shaping
from tokenenv.rewards.term import RewardTerm
from tokenenv.rewards.turn import Turn

HOLDS, BROKEN = 1e-5, 0.05
"""Relative errors: of float32 rewards, and of a promise that does not hold in some world."""


class RandomShares(RewardTerm):
    """The score, placed by random positive weights: attention that knows nothing."""

    name = "shares"
    kind = "hindsight"
    needs = frozenset({"scorer"})
    preserves_return = True
    preserves_gradient = False

    def place(self, texts: FinishedTexts, max_new_tokens: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        shares = torch.rand(len(texts.ids), max_new_tokens, generator=generator) * texts.own_mask(
            max_new_tokens
        )
        assert texts.score is not None
        return shares / shares.sum(1, keepdim=True) * texts.score[:, None]


REWARDS: dict[str, RewardSpec] = {
    **{name: name for name in DESIGNS},
    "random shares": RandomShares(),
    "another potential": Shaping(lambda states: states.step.float().sin()),
    "short segments": Segment(threshold=0.8),
    **{f"steps, {form}": Process(form) for form in FORMS},
    "turns, score": Turn("score"),
    "turns, differences": Turn("differences"),
    "turns, discounted score": Turn("score", gamma=0.5),
}
"""Every design that is registered, and a few terms more; the default segments are longer than these
texts."""
WORLDS: dict[str, Callable[[], Sequence[World]]] = {"alone": worlds, "answered": turn_worlds}


def fits(kind: str, scorer: str, name: str) -> bool:
    """Whether an env of these worlds with this scorer has what the design needs."""
    parts = WORLDS[kind]()[0].env(scorer, reward="terminal")._engine.context
    # A discount of turns is none where there is one.
    return (kind == "answered" or name != "turns, discounted score") and all(
        parts.has(need) for term in make_terms(REWARDS[name]).values() for need in term.needs
    )


CASES = [
    (name, scorer, kind)
    for name in REWARDS
    for scorer in SCORERS
    for kind in WORLDS
    if fits(kind, scorer, name)
]
cases = pytest.mark.parametrize(("name", "scorer", "kind"), CASES)


@dataclass
class Measured:
    """A design in one world: what it promises, what it pays, and how far that is from the score and
    its gradient."""

    keeps_return: bool
    keeps_gradient: bool
    rewards: Tensor
    exact: Tensor
    return_error: float
    gradient_error: float


@cache
def measured(name: str, scorer: str, kind: str = "alone") -> list[Measured]:
    """The design in each world; one of several terms pays their mean."""
    return [measure(world, name, scorer) for world in WORLDS[kind]()]


def measure(world: World, name: str, scorer: str) -> Measured:
    envs = world.env(scorer, reward=REWARDS[name], kl_coef=BETA)
    terms = {key: term for key, term in envs._engine.rewards.terms.items() if key != "kl"}
    paid = world.score(envs, kl_coef=0.0, weights=dict.fromkeys(terms, 1 / len(terms)))
    rewards, score = (
        torch.from_numpy(array).double() for array in (paid.token_rewards, paid.score)
    )
    exact = world.gradient_of_mean(lambda logprob: score)
    constant = rewards.sum(1) - score
    return Measured(
        keeps_return=stated([term.preserves_return for term in terms.values()]),
        keeps_gradient=stated([term.preserves_gradient for term in terms.values()]),
        rewards=rewards,
        exact=exact,
        return_error=float((constant - constant.mean()).norm() / (score - score.mean()).norm()),
        gradient_error=relative_error(world.policy_gradient(to_go(rewards)), exact),
    )


def stated(flags: list[bool | None]) -> bool:
    """A sum keeps what all of its terms keep; a design without a statement is no design."""
    assert None not in flags
    return all(flags)


def test_no_design_is_left_out() -> None:
    assert {name for name, _, _ in CASES} == set(REWARDS)
    assert {name for name, _, kind in CASES if kind == "answered"} == set(REWARDS)


@cases
def test_the_return_is_kept_where_a_design_says_so(name: str, scorer: str, kind: str) -> None:
    found = measured(name, scorer, kind)
    errors = [m.return_error for m in found]
    assert max(errors) < HOLDS if found[0].keeps_return else max(errors) > BROKEN


@cases
def test_the_gradient_is_kept_where_a_design_says_so(name: str, scorer: str, kind: str) -> None:
    found = measured(name, scorer, kind)
    errors = [m.gradient_error for m in found]
    assert max(errors) < HOLDS if found[0].keeps_gradient else max(errors) > BROKEN


@cases
def test_the_whole_return_at_every_token_is_exact_where_the_return_is_kept(
    name: str, scorer: str, kind: str
) -> None:
    """In hindsight placements too: what biases them is that reward-to-go leaves earlier shares
    out."""
    for world, m in zip(WORLDS[kind](), measured(name, scorer, kind), strict=True):
        whole = m.rewards.sum(1, keepdim=True).expand_as(m.rewards)
        error = relative_error(world.policy_gradient(whole), m.exact)
        assert error < HOLDS or not m.keeps_return


@pytest.mark.parametrize("name", ["uniform", "random shares"])
def test_hindsight_shares_keep_the_return_and_bias_reward_to_go_in_every_world(name: str) -> None:
    for m in measured(name, "sequence"):
        assert m.return_error < HOLDS
        assert m.gradient_error > 0.1


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9])
def test_discounted_shaping_keeps_the_discounted_gradient_alone(gamma: float) -> None:
    for world in worlds():
        shaped, terminal = (
            world.paid(reward=reward).token_rewards for reward in (Shaping(gamma=gamma), "terminal")
        )
        exact = world.policy_gradient(to_go(terminal, gamma))
        assert relative_error(world.policy_gradient(to_go(shaped, gamma)), exact) < HOLDS
        assert (
            relative_error(
                world.policy_gradient(to_go(shaped)), world.policy_gradient(to_go(terminal))
            )
            > BROKEN
        )
        assert not Shaping(gamma=gamma).preserves_return


@pytest.mark.parametrize("scorer", ["sequence", "token", "hindsight"])
def test_the_score_is_the_worlds_own_and_terminal_pays_it_last(scorer: str) -> None:
    for world in worlds():
        paid = world.paid(scorer, reward="terminal")
        own = (
            world.shares * world.mask
            if scorer == "hindsight"
            else world.rewards(per_token=scorer == "token")
        )
        score = own.sum(1)
        torch.testing.assert_close(torch.from_numpy(paid.score).double(), score, rtol=0, atol=1e-6)
        torch.testing.assert_close(
            torch.from_numpy(paid.token_rewards).double(),
            score[:, None] * world.final,
            rtol=0,
            atol=1e-6,
        )


def test_the_dense_form_of_a_rule_keeps_its_return_and_its_gradient() -> None:
    """A rule has a return of its own, so that of its plain form is what must be kept."""

    def rule(prompt: list[int], response: list[int]) -> float:
        return len(prompt) + sum((t + 2) * (token + 1) % 5 for t, token in enumerate(response)) ** 2

    for world in worlds():
        dense, plain = (
            torch.from_numpy(
                world.paid(reward=Rule(rule, on="tokens", dense=delta)).token_rewards
            ).double()
            for delta in (True, False)
        )
        constant = dense.sum(1) - plain.sum(1)
        assert float(constant.std()) < HOLDS
        assert (dense != 0).sum() > (plain != 0).sum()
        exact = world.policy_gradient(to_go(plain))
        assert relative_error(world.policy_gradient(to_go(dense)), exact) < HOLDS
