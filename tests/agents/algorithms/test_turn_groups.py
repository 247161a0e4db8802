"""Group baselines by turn: by hand, and unbiased or not by enumeration of all groups of a world in
which an environment answers and the policy decides how many turns there are."""

from typing import Any

import pytest
import torch
from tabular import World, relative_error, to_go
from torch import Tensor
from toy_env import ToyEnv
from turn_world import TurnWorld

from tokenenv.agents import GRPO, RLOO
from tokenenv.agents.algorithms.groups import at_turns, compared, turn_mean
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.errors import InvalidArgument

# Text 0 has turns of 2 and 1 tokens, text 1 one of 1, text 2 three of 1, and text 3 one of 3.
TURNS = torch.tensor([[0, 0, 1], [0, 5, 5], [0, 1, 2], [0, 0, 0]])
LENGTHS = torch.tensor([3, 1, 3, 3])
RETURNS = torch.tensor([[6.0, 4, 1], [5, 99, 99], [2, 1, 0], [4, 3, 7]])


def test_values_where_turns_begin() -> None:
    values, counts = at_turns(RETURNS, LENGTHS, TURNS)
    assert counts.tolist() == [2, 1, 3, 1]
    assert values.tolist() == [[6, 1, 0], [5, 0, 0], [2, 1, 0], [4, 0, 0]]


def test_means_by_hand() -> None:
    """Text 1 stands with 5 in every turn, and text 3 with 4."""
    others = turn_mean(RETURNS, LENGTHS, 2, TURNS, leave_one_out=True)
    assert others[0].tolist() == [5, 5, 5]
    assert others[1, 0] == 6
    assert others[2].tolist() == [4, 4, 4]
    assert others[3].tolist() == [2, 2, 2]
    of_all = turn_mean(RETURNS, LENGTHS, 4, TURNS, leave_one_out=False)
    first, second, third = (6 + 5 + 2 + 4) / 4, (1 + 5 + 1 + 4) / 4, (1 + 5 + 0 + 4) / 4
    assert of_all[0].tolist() == [first, first, second]
    assert of_all[2].tolist() == [first, second, third]
    rest = compared(RETURNS, LENGTHS, 4, TURNS, leave_one_out=False)
    assert rest[2].tolist() == [2 - first, 1 - second, 0 - third]


def test_a_return_that_is_the_same_everywhere_has_the_sequence_baseline() -> None:
    """With the reward at the end, place and turn make no difference, and equal texts leave 0."""
    terminal = torch.tensor([0.7, 0.7, 0.7, 0.9])[:, None].expand(4, 3)
    for leave_one_out in (True, False):
        by_turn, by_place = (
            compared(terminal, LENGTHS, 4, turns, leave_one_out=leave_one_out)
            for turns in (TURNS, None)
        )
        for row, length in enumerate(LENGTHS):
            torch.testing.assert_close(by_turn[row, :length], by_place[row, :length])
    flat = torch.full((4, 3), 0.7)
    assert (compared(flat, LENGTHS, 4, TURNS, leave_one_out=True)[LENGTHS == 3] == 0).all()


def test_what_is_no_baseline_is_refused() -> None:
    for algorithm in (RLOO, GRPO):
        with pytest.raises(InvalidArgument, match="baseline='turns' is not known; allowed: place"):
            algorithm(ToyEnv(4, group_size=2), baseline="turns")


# ---------------------------------------------------------------- by enumeration

WORLDS = {"chance": TurnWorld(10), "fixed": TurnWorld(6, random=False)}
BIASES = {("chance", 2): 0.21, ("fixed", 2): 0.29, ("fixed", 3): 0.40}
"""Relative errors of the gradient where the rewards of turns are centred; docs/algorithms.md quotes
them. Turns earn 1 on average."""
each_case = pytest.mark.parametrize(("kind", "size"), BIASES)


def earned(world: TurnWorld) -> Tensor:
    """(B, T): the task's own rewards of turns, and the score at the end."""
    return world.earned + world.score_of("sequence")[:, None] * world.final


class Groups:
    """Every group of `size` texts of a world, and how likely each is."""

    def __init__(self, world: TurnWorld, size: int) -> None:
        self.world, self.size = world, size
        rows = torch.cartesian_prod(*[torch.arange(len(world.texts))] * size)
        self.probs = world.probs(world.policy)[rows].prod(1)
        self.flat = rows.flatten()

    def batch(self, rewards: Tensor) -> EpisodeBatch:
        """All of them, one after the other, paid `rewards` (B, T)."""
        world, flat, count = self.world, self.flat, len(self.flat)
        nothing, never = torch.zeros(count), torch.zeros(count, dtype=torch.bool)
        logprob = world.logprob(world.policy)[flat]
        return EpisodeBatch(
            tokens_BL=world.tokens[flat],
            length_B=world.positions.max(1).values[flat],
            response_length_B=world.length[flat],
            position_BT1=world.positions[flat],
            logprob_BT=logprob,
            ref_logprob_BT=logprob,
            reward_BT=rewards[flat],
            potential_BT1=torch.zeros(count, world.mask.shape[1] + 1),
            kl_coef_B=nothing,
            terminated_B=never,
            truncated_B=never,
            score_B=nothing,
            gold_B=nothing,
            prompt_id_B=nothing.long(),
            version_B=nothing.long(),
            bootstraps_B=never,
            slot_B=nothing.long(),
            index_B=nothing.long(),
            terms={"task": rewards[flat]},
        )

    def gradient(self, advantages: Tensor) -> Tensor:
        """What a learner follows on average, with the advantages (groups x size, T) of all texts
        of all groups: their mean for each text, over all that may be beside it."""
        weighted = self.probs.repeat_interleave(self.size)[:, None] * advantages / self.size
        credit = torch.zeros(self.world.mask.shape, dtype=torch.float64)
        credit = credit.index_add(0, self.flat, weighted.double())
        each = self.world.probs(self.world.policy)
        return self.world.policy_gradient(credit / each[:, None] * self.world.mask)


def exact_gradient(world: TurnWorld) -> Tensor:
    """Of the mean of all that is earned."""
    return world.gradient_of_mean(lambda logprob: earned(world).sum(1))


@each_case
@pytest.mark.parametrize("baseline", ["place", "turn"])
@pytest.mark.parametrize("algorithm", [RLOO, GRPO])
def test_returns_compared_are_unbiased(kind: str, size: int, baseline: str, algorithm: Any) -> None:
    """RLOO's mean gradient is the exact one, GRPO's (G - 1) / G of it: at the same place, and in the
    same turn."""
    world = WORLDS[kind]
    groups = Groups(world, size)
    options = {"scale": "none"} if algorithm is GRPO else {}
    agent = algorithm(ToyEnv(2 * size, group_size=size), baseline=baseline, whiten=False, **options)
    found = groups.gradient(agent.advantages(groups.batch(earned(world))))
    factor = 1.0 if algorithm is RLOO else (size - 1) / size
    assert relative_error(found, factor * exact_gradient(world)) < 1e-5


def test_the_two_baselines_differ() -> None:
    world = WORLDS["chance"]
    groups = Groups(world, 2)
    by_place, by_turn = (
        RLOO(ToyEnv(4, group_size=2), baseline=baseline).advantages(groups.batch(earned(world)))
        for baseline in ("place", "turn")
    )
    assert (by_place - by_turn)[world.mask[groups.flat]].abs().max() > 0.5


# What some turn methods do instead: a mean is taken from the reward of each turn, over the texts
# that have such a turn, and what is left is added up along the text.


def by_turns(world: TurnWorld) -> tuple[Tensor, Tensor]:
    """(B, S) what each turn of each text earns, and bool: whether the text has that turn."""
    count = int(world.turns.max()) + 1
    rewards = torch.zeros(len(world.texts), count, dtype=torch.float64)
    rewards = rewards.scatter_add(1, world.turns, earned(world) * world.mask)
    return rewards, torch.arange(count) <= world.turns.max(1).values[:, None]


def centred(groups: Groups, *, divide: bool = False) -> Tensor:
    """(groups x size, T): the sum of the rewards of a token's turn and those after it, each without
    the mean of the group's other texts that have the turn, 0 where none has; with `divide` each
    also divided by the group's deviation in that turn."""
    rewards, has = (x[groups.flat].unflatten(0, (-1, groups.size)) for x in by_turns(groups.world))
    paid = rewards * has
    others = has.sum(1, keepdim=True) - has.long()
    mean = (paid.sum(1, keepdim=True) - paid) / others.clamp(min=1)
    rest = (rewards - mean) * has
    if divide:
        rest = rest / (rest.square().sum(1, keepdim=True) + 1e-2).sqrt()
    return to_go(rest.flatten(0, 1)).gather(1, groups.world.turns[groups.flat])


@each_case
def test_rewards_centred_by_turn_are_biased_by_the_mean_reward_of_a_turn(
    kind: str, size: int
) -> None:
    """By exactly - sum_k E[mean reward of turn k among the others] grad P(a text has turn k), which
    with large groups is - sum_k E[r_k | there is a turn k] grad P(there is a turn k): a price on
    going on for another turn."""
    world = WORLDS[kind]
    groups, exact = Groups(world, size), exact_gradient(world)
    found = groups.gradient(centred(groups))
    rewards, has = by_turns(world)
    probs = world.probs(world.policy)
    chance = probs @ has.double()
    mean = (probs @ (rewards * has)) / chance
    # Of G - 1 others none may have the turn, and then nothing is taken away.
    taken = mean * (1 - (1 - chance) ** (size - 1))
    price = world.gradient_of_mean(lambda logprob: has.double() @ taken)
    assert relative_error(found, exact - price) < 1e-6
    assert relative_error(found, exact) == pytest.approx(BIASES[kind, size], abs=0.01)


def test_dividing_by_the_deviation_of_a_turn_turns_the_gradient() -> None:
    world = WORLDS["fixed"]
    groups, exact = Groups(world, 2), exact_gradient(world)
    found = groups.gradient(centred(groups, divide=True))
    cosine = float((found * exact).sum() / (found.norm() * exact.norm()))
    assert cosine < 0.95


class SameTurns(World):
    """Every text has two turns of two tokens, and what a turn earns depends on all before."""

    def __init__(self) -> None:
        super().__init__(0)
        self.turns = torch.tensor([0, 0, 1, 1]).expand(len(self.texts), -1)
        self.earned = (self.scores + 1.0)[self.after] * torch.tensor([0.0, 1.0, 0.0, 0.0])

    def score_of(self, scorer: str) -> Tensor:
        """(B,)."""
        return self.rewards(per_token=False).sum(1)


def test_where_all_texts_have_the_same_turns_centred_rewards_are_unbiased() -> None:
    world = SameTurns()
    groups, exact = Groups(world, 2), exact_gradient(world)
    assert relative_error(groups.gradient(centred(groups)), exact) < 1e-9
