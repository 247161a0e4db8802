"""Every algorithm's expected gradient on a small Dialogue-v0 is the exact one of J, where the
environment writes into the texts: as a function of them, and at random."""

from functools import cache

import pytest
import torch
from dialogue_world import DialogueWorld
from dialogues import NOISES
from gradients import (
    CASES,
    Case,
    cosine,
    exact_gradient,
    found_gradient,
    grpo_gradient,
)
from tabular import to_go
from torch import Tensor

EXACT, BETA = 0.999, 0.3
DESIGNS = ("terminal", "turn", "oracle")
EVERY = CASES | {
    "ppo, lambda_turn 1": Case("ppo", {"lambda_actor": 1.0, "lambda_turn": 1.0}),
    "rloo, baseline turn": Case("rloo", {"baseline": "turn"}, texts=60_000),
}
each_kind = pytest.mark.parametrize("kind", NOISES)
each_design = pytest.mark.parametrize("design", DESIGNS)


@cache
def world_of(kind: str) -> DialogueWorld:
    return DialogueWorld(kind)


def wanted(case: Case, world: DialogueWorld, design: str) -> Tensor:
    if not case.own:
        return exact_gradient(world, BETA)
    terms = torch.from_numpy(world.paid(reward=design).token_rewards).double()
    return grpo_gradient(world, terms, BETA)


@pytest.mark.parametrize("case", EVERY.values(), ids=EVERY)
@each_design
@each_kind
def test_the_expected_gradient_is_exact(case: Case, design: str, kind: str) -> None:
    world = world_of(kind)
    assert cosine(found_gradient(case, world, design, BETA), wanted(case, world, design)) > EXACT


def kl_to(world: DialogueWorld, logits: Tensor, backwards: bool = False) -> Tensor:
    """KL(pi || pi_ref), or `backwards` KL(pi_ref || pi), (B,): summed over the states in which the
    policy acts."""
    one, other = logits.log_softmax(-1)[world.before], world.reference.logprobs[world.before]
    if backwards:
        one, other = other, one
    return (one.exp() * (one - other)).sum((1, 2))


@pytest.mark.parametrize(("setting", "backwards"), [("full_kl_coef", False), ("k3_coef", True)])
@each_kind
def test_the_kl_as_a_loss_is_that_of_the_policys_words(
    setting: str, backwards: bool, kind: str
) -> None:
    """It is differentiated in the states in which the policy acts; as ever, it does not see which
    states its words lead to."""
    world = world_of(kind)
    settings = {"lambda_actor": 1.0, "whiten": False, setting: BETA}
    found = found_gradient(Case("ppo", settings), world, "terminal", 0.0)

    def own(logits: Tensor) -> Tensor:
        return -BETA * kl_to(world, logits, backwards)

    credit = to_go(world.rewards())
    assert cosine(found, world.policy_gradient(credit, own)) > EXACT
    assert cosine(found, world.policy_gradient(credit)) < EXACT
