"""The process reward: what each form pays at the ends of steps, on every text of small worlds."""

from typing import Any

import pytest
import tabular
import torch
from tabular import STEP_END, World, worlds
from torch import Tensor

from tokenenv.env.vector_env import TokenVectorEnv
from tokenenv.errors import InvalidArgument
from tokenenv.rewards.process import FORMS, Process
from tokenenv.types import Scorer, Task

scorers = pytest.mark.parametrize("scorer", ["sequence", "token"])
both_ends = pytest.mark.parametrize("score_truncated", [True, False])
FLOOR, TEMPERATURE = 0.3, 0.5


def ends_of(world: World, score_truncated: bool = True) -> Tensor:
    """(B, T) bool: the last tokens of steps; an unscored truncation ends none."""
    due = world.final & (~world.truncated | score_truncated)[:, None]
    return world.mask & ((world.tokens == STEP_END) | due)


def by_hand(world: World, form: str, score_truncated: bool) -> Tensor:
    """(B, T): text by text, step by step."""
    q, ends, out = (
        world.scores[world.after],
        ends_of(world, score_truncated),
        torch.zeros_like(world.mask, dtype=torch.float64),
    )
    for row in range(len(out)):
        steps = ends[row].nonzero().flatten().tolist()
        if form == "min":
            if world.truncated[row] and not score_truncated:
                continue
            share = torch.softmax(-q[row, steps] / TEMPERATURE, 0)
            out[row, steps] = share * q[row, steps]
            continue
        before = world.scores[0]
        for t in steps:
            out[row, t] = {
                "sum": q[row, t],
                "delta": q[row, t] - before,
                "clip": min(q[row, t] - FLOOR, 0.0),
            }[form]
            before = q[row, t]
    return out


def paid(world: World, scorer: str, reward: Any, **options: Any) -> Tensor:
    return torch.from_numpy(world.paid(scorer, reward=reward, **options).token_rewards).double()


@scorers
@both_ends
@pytest.mark.parametrize("form", FORMS)
def test_each_form_pays_its_formula_at_the_ends_of_steps(
    form: str, score_truncated: bool, scorer: str
) -> None:
    for world in worlds():
        found = paid(
            world,
            scorer,
            Process(form, floor=FLOOR, temperature=TEMPERATURE),
            score_truncated=score_truncated,
        )
        torch.testing.assert_close(found, by_hand(world, form, score_truncated), rtol=0, atol=1e-6)


def test_the_form_about_the_worst_step_comes_near_its_score() -> None:
    for world in worlds():
        q = torch.where(ends_of(world), world.scores[world.after], torch.inf)
        found = paid(world, "sequence", Process("min", temperature=1e-4)).sum(1)
        torch.testing.assert_close(found, q.min(1).values, rtol=0, atol=1e-3)


def test_differences_of_the_sequence_score_preserve_both_and_of_token_scores_neither() -> None:
    for scorer, preserved in (("sequence", True), ("token", False)):
        term = worlds()[0].env(scorer, reward=Process("delta"))._engine.rewards.terms["process"]
        assert term.preserves_return is term.preserves_gradient is preserved
    world = worlds()[2]
    expected = world.rewards(per_token=False).sum(1) - world.scores[0]
    torch.testing.assert_close(
        paid(world, "sequence", Process("delta")).sum(1), expected, rtol=0, atol=1e-6
    )


def own_step_scorer(world: World, form: str) -> TokenVectorEnv:
    """An env whose steps are scored by something else than its score: minus the number of the
    history."""
    task = Task(
        tokenizer=None,
        reference=world.reference,
        prompts=[[0]],
        max_prompt_tokens=1,
        max_new_tokens=tabular.T,
        stop_token_ids=world.stops,
        scorer=tabular.SCORERS["sequence"](world),
        step_scorer=Scorer(world.reference, lambda states: -states.float(), per_token=False),
        step_end_token_ids=(STEP_END,),
    )
    return TokenVectorEnv(1, task=task, reward=Process(form), kl="none")


def test_a_task_may_have_a_step_scorer_of_its_own() -> None:
    world = worlds()[2]
    envs = own_step_scorer(world, "delta")
    term = envs._engine.rewards.terms["process"]
    assert term.preserves_return is term.preserves_gradient is False
    found = torch.from_numpy(world.score(envs).token_rewards).double()
    last = world.after.max(1).values
    torch.testing.assert_close(found.sum(1), -last.double(), rtol=0, atol=1e-5)  # the prompt's is 0
    total = torch.from_numpy(world.score(own_step_scorer(world, "sum")).token_rewards).double()
    torch.testing.assert_close(
        total, torch.where(ends_of(world), -world.after.double(), 0.0), rtol=0, atol=1e-5
    )


def test_wrong_arguments_and_missing_parts_are_named() -> None:
    with pytest.raises(InvalidArgument, match=r"form='mean'.*allowed.*clip"):
        Process("mean")
    with pytest.raises(InvalidArgument, match=r"temperature=0.0 is not allowed"):
        Process("min", temperature=0.0)
    with pytest.raises(
        InvalidArgument, match=r"'process' needs a causal reward model .* which scores steps"
    ):
        worlds()[0].env("hindsight", reward="process")
