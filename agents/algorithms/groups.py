"""Texts compared with others of the same prompt: baselines from the other texts, place by place and
source by source.

What it does: the return R_it of token t of text i is what its text still earns from there on. Its
baseline is the mean of R_jt over the other texts j of its group, at the same place. A text that has
ended stands with the return at its last token.

With a reward on the last token only, this is the published sequence-level baseline. A baseline may
depend on anything but the token itself and what follows it, so a mean of the other texts does not
bias the gradient; a mean with the own text in it scales the gradient by (G - 1) / G.

What it leaves out: a critic. Texts that begin alike have no value in common.

Suffixes: B episodes, T response tokens; G consecutive episodes are a group (as a suffix: one number
a group).
"""

from dataclasses import dataclass, field
from numbers import Real

import torch
from torch import Tensor

from tokenenv.agents.algorithms.policy_gradient import PolicyGradient, PolicyGradientConfig
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.learning.advantages import ROUNDING, returns_to_go
from tokenenv.errors import InvalidArgument, check_choice


@dataclass(kw_only=True, slots=True)
class GroupConfig(PolicyGradientConfig):
    """Settings shared by the group methods."""

    gammas: dict[str, float] = field(default_factory=dict)
    """Discounts per token, 0 to 1, of single reward terms by name, in place of `gamma` ("kl" is the
    KL penalty)."""

    def __post_init__(self) -> None:
        PolicyGradientConfig.__post_init__(self)
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


def compared(
    values_BT: Tensor, lengths_B: Tensor, group_size: int, *, leave_one_out: bool
) -> Tensor:
    """Return (B, T): the values minus `group_mean`, exactly zero where the rest is no more than
    rounding of the group's largest value."""
    rest_BT = values_BT - group_mean(values_BT, lengths_B, group_size, leave_one_out=leave_one_out)
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
