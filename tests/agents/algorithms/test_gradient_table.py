"""Every algorithm's expected gradient, at a policy away from the reference, is the exact one of
what it optimises.

`benchmarks/gradients.py` prints the table, with settings that are biased by design beside these.
"""

import pytest
import torch
from gradients import (
    CASES,
    DESIGNS,
    WORLDS,
    Case,
    cosine,
    earlier_policy,
    exact_gradient,
    found_gradient,
    grpo_gradient,
    make_world,
)
from tabular import STOP, World

from tokenenv.agents import ALGORITHMS

EXACT = 0.999
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_design = pytest.mark.parametrize("design", DESIGNS)


def wanted(case: Case, world: World, design: str, beta: float) -> torch.Tensor:
    if not case.own:
        return exact_gradient(world, beta)
    return grpo_gradient(
        world, torch.from_numpy(world.paid(reward=design).token_rewards).double(), beta
    )


@each_case
@each_design
@pytest.mark.parametrize("kind", WORLDS)
def test_the_expected_gradient_is_exact(case: Case, design: str, kind: str) -> None:
    """Of J with its KL; with scores of 0 and 1 nearly all groups are flat. GRPO's own objective is
    known for those alone."""
    kind = "flat groups" if case.own else kind
    world = make_world(kind, stops=() if kind == "flat groups" else (STOP,))
    beta = WORLDS[kind]
    assert cosine(world.policy, world.reference.logprobs) < 0.5
    assert (
        cosine(found_gradient(case, world, design, beta), wanted(case, world, design, beta)) > EXACT
    )


@pytest.mark.parametrize(
    "case",
    [case for case in CASES.values() if not case.own],
    ids=[n for n, c in CASES.items() if not c.own],
)
@each_design
def test_texts_that_are_a_little_stale_turn_it_little(case: Case, design: str) -> None:
    world, beta = make_world("dense", stops=(STOP,)), WORLDS["dense"]
    earlier, kl = earlier_policy(world, 0.02)
    assert 5e-5 < kl < 2e-4
    assert (
        cosine(found_gradient(case, world, design, beta, earlier), exact_gradient(world, beta))
        > EXACT
    )


def test_grpos_own_gradient_is_that_of_j_with_the_score_on_another_scale() -> None:
    """In one world with one prompt: what the score contributes has the direction of its own
    gradient."""
    world = make_world("flat groups")
    terminal = torch.from_numpy(world.paid(reward="terminal").token_rewards).double()
    assert cosine(grpo_gradient(world, terminal, 0.0), exact_gradient(world, 0.0)) > 1 - 1e-9


def test_no_algorithm_is_left_out() -> None:
    assert {case.algorithm for case in CASES.values()} == set(ALGORITHMS) - {
        "best-of-n",
        "reference",
    }
