"""Texts compared with others of the same prompt: baselines from the other texts, place by place and
source by source.

With a reward on the last token only, all of this is the published sequence-level baseline. With
dense rewards the return of a token is what is still to come after it, and it is compared with what
is still to come in the others at the same place. A baseline may depend on anything but the token
itself and what follows it, so a mean of the other texts does not bias the gradient; a mean with the
own text in it scales it by (G - 1) / G.

Suffixes: B episodes, T response tokens; G consecutive episodes are a group.
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
        """Returns-to-go (B, T) of each source of reward, each with its own discount."""
        cfg, sources = self.config, self.sources(batch)
        for name in cfg.gammas:
            check_choice("gammas key", name, sources)
        return {
            name: returns_to_go(
                rewards_BT, batch.response_length_B, cfg.gammas.get(name, cfg.gamma)
            )
            for name, rewards_BT in sources.items()
        }


def hold_last(values_BT: Tensor, lengths_B: Tensor) -> Tensor:
    """Right of each text the value at its last token: what a longer text is compared with once this
    one has ended.

    A reward on the last token alone thus gives every place of a text the same return, ended or not.
    """
    last_B1 = values_BT.gather(1, lengths_B[:, None] - 1)
    right_BT = torch.arange(values_BT.shape[1]) >= lengths_B[:, None]
    return torch.where(right_BT, last_B1, values_BT)


def group_mean(
    values_BT: Tensor, lengths_B: Tensor, group_size: int, *, leave_one_out: bool
) -> Tensor:
    """(B, T): the mean of each group's values at every place, each text's own left out or not."""
    held_GT = hold_last(values_BT, lengths_B).unflatten(0, (-1, group_size))
    sums_GT = held_GT.sum(1, keepdim=True)
    if leave_one_out:
        return ((sums_GT - held_GT) / (group_size - 1)).flatten(0, 1)
    return (sums_GT / group_size).expand_as(held_GT).flatten(0, 1)


def compared(
    values_BT: Tensor, lengths_B: Tensor, group_size: int, *, leave_one_out: bool
) -> Tensor:
    """(B, T): the values minus `group_mean`, exactly zero where that is no more than rounding of
    the group's largest value."""
    rest_BT = values_BT - group_mean(values_BT, lengths_B, group_size, leave_one_out=leave_one_out)
    rounding_G = group_rounding(values_BT, lengths_B, group_size)
    return rest_BT.masked_fill(
        rest_BT.abs() <= rounding_G.repeat_interleave(group_size)[:, None], 0.0
    )


def group_rounding(values_BT: Tensor, lengths_B: Tensor, group_size: int) -> Tensor:
    """One a group: what rounding may leave of equal returns. The largest return at any place
    counts: a whole return that is 0 may be a sum of large rewards."""
    return ROUNDING * hold_last(values_BT, lengths_B).unflatten(0, (-1, group_size)).abs().amax(
        (1, 2)
    )


def group_std(returns_BT: Tensor, lengths_B: Tensor, group_size: int) -> Tensor:
    """(B, 1): the standard deviation of each group's whole returns, `sqrt(sum (R - mean)^2 / (G -
    1))`, as TRL, verl and OpenRLHF have it; 1 where the group is flat."""
    std_G = returns_BT[:, 0].unflatten(0, (-1, group_size)).std(1)
    flat_G = flat_groups(returns_BT, lengths_B, group_size)
    return torch.where(flat_G, 1.0, std_G).repeat_interleave(group_size)[:, None]


def flat_groups(returns_BT: Tensor, lengths_B: Tensor, group_size: int) -> Tensor:
    """bool, one a group: whether its whole returns are the same up to rounding."""
    std_G = returns_BT[:, 0].unflatten(0, (-1, group_size)).std(1)
    return std_G <= group_rounding(returns_BT, lengths_B, group_size)
