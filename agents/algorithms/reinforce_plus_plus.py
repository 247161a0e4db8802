"""REINFORCE++ (Hu et al. 2025, arXiv 2501.03262): each token's return-to-go, whitened over the
batch, and no critic.

What it does: a token is credited with its own reward and those after it, the whole KL penalty
included,

    A_t = whiten( sum_{k >= t} gamma^(k-t) r_k )        over the tokens of the batch

so the batch's mean is the baseline. The loss is PPO's clip.

What it leaves out: a critic, and groups. The baseline knows neither the prompt nor the place in the
text, so advantages vary more than with either. Dense rewards help it most.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gymnasium.vector import VectorEnv
from torch import Tensor

from tokenenv.agents.algorithms.policy_gradient import PolicyGradient, PolicyGradientConfig
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.keywords import AgentKeywords, takes
from tokenenv.agents.learning.advantages import returns_to_go


class ReinforcePlusPlus(PolicyGradient):
    """Token-level REINFORCE with a batch baseline. Its settings are those of every policy
    gradient."""

    config_class = PolicyGradientConfig
    config: PolicyGradientConfig

    if TYPE_CHECKING:

        @dataclass(kw_only=True)
        class _Keywords(PolicyGradientConfig, AgentKeywords): ...

        @takes(_Keywords)
        def __init__(self, envs: VectorEnv, config: Any = None, **keywords: Any) -> None: ...

    def advantages(self, batch: EpisodeBatch) -> Tensor:
        """Return the returns-to-go (B, T)."""
        return returns_to_go(self.rewards(batch), batch.response_length_B, self.config.gamma)
