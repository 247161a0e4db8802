"""Texts compared with others of the same prompt: baselines from the other texts, place by place and
source by source.

What it does: the return R_it of token t of text i is what its text still earns from there on. Its
baseline is the mean of R_jt over the other texts j of its group, at the same place. A text that has
ended stands with the return at its last token.

With `baseline="turn"` the place is a turn of the policy's: a token of turn k is compared with what
the other texts still earn from the start of their turn k on, and a text of fewer turns stands with
what it earned from its last turn on.

With a reward on the last token only, both are the published sequence-level baseline. A baseline may
depend on anything but the token itself and what follows it, so a mean of the other texts does not
bias the gradient; a mean with the own text in it scales the gradient by (G - 1) / G. What is
compared are returns, never rewards: a mean that is taken from each turn's own reward, as some turn
methods do, is a price on going on for another turn, of the mean reward of a turn (tests show it).

What it leaves out: a critic. Texts that begin alike have no value in common.

Suffixes: B episodes, T response tokens, S turns; G consecutive episodes are a group (as a suffix:
one number a group).
"""

from dataclasses import dataclass, field
from numbers import Real

import torch
from torch import Tensor

from tokenenv.agents.algorithms.policy_gradient import PolicyGradient, PolicyGradientConfig
from tokenenv.agents.episodes import EpisodeBatch, token_mask
from tokenenv.agents.learning.advantages import ROUNDING, returns_to_go
from tokenenv.errors import InvalidArgument, check_choice
from tokenenv.turns import turn_numbers

BASELINES = ("place", "turn")


@dataclass(kw_only=True, slots=True)
class GroupConfig(PolicyGradientConfig):
    """Settings shared by the group methods."""

    baseline: str = "place"
    """Where the other texts of a group are looked at: "place": as many tokens of the policy's own
    after the prompt; "turn": at the start of the same turn, where the environment writes into
    texts."""
    gammas: dict[str, float] = field(default_factory=dict)
    """Discounts per token, 0 to 1, of single reward terms by name, in place of `gamma` ("kl" is the
    KL penalty)."""

    def __post_init__(self) -> None:
        PolicyGradientConfig.__post_init__(self)
        check_choice("baseline", self.baseline, BASELINES)
        for name, gamma in self.gammas.items():
            if not (isinstance(gamma, Real) and 0.0 <= gamma <= 1.0):
                raise InvalidArgument(
                    f"gammas[{name!r}]={gamma} is not allowed; it must lie between 0 and 1."
                )


class GroupMethod(PolicyGradient):
    """Base of the agents whose baseline is a group's."""

    config_class = GroupConfig
    config: GroupConfig
    grouped = True

    def returns(self, batch: EpisodeBatch) -> dict[str, Tensor]:
        """Return the returns-to-go (B, T) of each source of reward by name, each with its own
        discount; "kl" is the whole KL penalty."""
        cfg, sources, lengths_B = self.config, self.sources(batch), batch.response_length_B
        for name in cfg.gammas:
            check_choice("gammas key", name, sources)
        gammas = dict.fromkeys(sources, cfg.gamma) | cfg.gammas
        return {
            name: returns_to_go(rewards_BT, lengths_B, gammas[name])
            for name, rewards_BT in sources.items()
        }

    def compared(self, returns_BT: Tensor, batch: EpisodeBatch, *, leave_one_out: bool) -> Tensor:
        """Return (B, T): returns minus their group's mean, at the place that `baseline` says."""
        lengths_B, turns_BT = batch.response_length_B, None
        if self.config.baseline == "turn":
            places = batch.position_BT1[:, :-1].numpy()
            turns_BT = torch.from_numpy(turn_numbers(places))
        return compared(
            returns_BT, lengths_B, self.group_size, turns_BT, leave_one_out=leave_one_out
        )


def at_turns(values_BT: Tensor, lengths_B: Tensor, turns_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values (B, S) at the first token of each turn, and how many turns each text has
    (B,)."""
    own_BT = token_mask(lengths_B, turns_BT.shape[1])
    begins_BT = own_BT & (turns_BT.diff(dim=1, prepend=turns_BT[:, :1] - 1) != 0)
    counts_B = begins_BT.sum(1)
    values_BS = values_BT.new_zeros(len(values_BT), int(counts_B.max()))
    rows, columns = begins_BT.nonzero(as_tuple=True)
    values_BS[rows, turns_BT[rows, columns]] = values_BT[rows, columns]
    return values_BS, counts_B


def hold_last(values_BT: Tensor, lengths_B: Tensor) -> Tensor:
    """Return `values_BT` with the value at each text's last token repeated to the right of it.

    A longer text is compared with that once this one has ended. A reward on the last token alone
    thus gives every place of a text the same return, ended or not.
    """
    last_B1 = values_BT.gather(1, lengths_B[:, None] - 1)
    right_BT = torch.arange(values_BT.shape[1]) >= lengths_B[:, None]
    return torch.where(right_BT, last_B1, values_BT)


def group_mean(
    values_BT: Tensor, lengths_B: Tensor, group_size: int, *, leave_one_out: bool
) -> Tensor:
    """Return (B, T): the mean of each group's values at every place; with `leave_one_out` without
    each text's own."""
    held_GT = hold_last(values_BT, lengths_B).unflatten(0, (-1, group_size))
    sums_GT = held_GT.sum(1, keepdim=True)
    if leave_one_out:
        return ((sums_GT - held_GT) / (group_size - 1)).flatten(0, 1)
    return (sums_GT / group_size).expand_as(held_GT).flatten(0, 1)


def turn_mean(
    values_BT: Tensor,
    lengths_B: Tensor,
    group_size: int,
    turns_BT: Tensor,
    *,
    leave_one_out: bool,
) -> Tensor:
    """Return (B, T): for each token, the mean of its group's values at the start of the token's
    turn; with `leave_one_out` without each text's own. `turns_BT` int64 are the numbers of the
    tokens' turns."""
    starts_BS, counts_B = at_turns(values_BT, lengths_B, turns_BT)
    mean_BS = group_mean(starts_BS, counts_B, group_size, leave_one_out=leave_one_out)
    return mean_BS.gather(1, turns_BT.clamp(max=mean_BS.shape[1] - 1))


def compared(
    values_BT: Tensor,
    lengths_B: Tensor,
    group_size: int,
    turns_BT: Tensor | None = None,
    *,
    leave_one_out: bool,
) -> Tensor:
    """Return (B, T): the values minus `group_mean`, or minus `turn_mean` where the tokens' turns
    are given, exactly zero where the rest is no more than rounding of the group's largest value."""
    if turns_BT is None:
        mean_BT = group_mean(values_BT, lengths_B, group_size, leave_one_out=leave_one_out)
    else:
        where = lengths_B, group_size, turns_BT
        mean_BT = turn_mean(values_BT, *where, leave_one_out=leave_one_out)
    rest_BT = values_BT - mean_BT
    # Of equal returns nothing may be left: a deviation or whitening would blow rounding up to 1.
    rounding_G = group_rounding(values_BT, lengths_B, group_size)
    rounding_B1 = rounding_G.repeat_interleave(group_size)[:, None]
    return rest_BT.masked_fill(rest_BT.abs() <= rounding_B1, 0.0)


def group_rounding(values_BT: Tensor, lengths_B: Tensor, group_size: int) -> Tensor:
    """Return what rounding may leave of equal returns, one number a group.

    The largest return at any place counts, as a whole return that is 0 may be a sum of large
    rewards.
    """
    held_GT = hold_last(values_BT, lengths_B).unflatten(0, (-1, group_size))
    return ROUNDING * held_GT.abs().amax((1, 2))


def group_std(returns_BT: Tensor, lengths_B: Tensor, group_size: int) -> Tensor:
    """Return (B, 1): the standard deviation of each group's whole returns, `sqrt(sum (R - mean)^2 /
    (G - 1))`, as in TRL, verl and OpenRLHF; 1 where the group is flat."""
    std_G = returns_BT[:, 0].unflatten(0, (-1, group_size)).std(1)
    flat_G = flat_groups(returns_BT, lengths_B, group_size)
    return torch.where(flat_G, 1.0, std_G).repeat_interleave(group_size)[:, None]


def flat_groups(returns_BT: Tensor, lengths_B: Tensor, group_size: int) -> Tensor:
    """Return bool, one a group: whether its whole returns are the same up to rounding."""
    std_G = returns_BT[:, 0].unflatten(0, (-1, group_size)).std(1)
    return std_G <= group_rounding(returns_BT, lengths_B, group_size)
