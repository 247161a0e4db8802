"""PPO: proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347), one token an action.

What it does: it learns from any dense reward that the env pays, with the whole KL penalty inside. A
critic V estimates what a text still earns, and with r_t the reward of token t

    d_t = r_t + gamma V(s_{t+1}) - V(s_t),      A_t = sum_k (gamma lambda)^k d_{t+k}        (GAE)
    L = -mean min(ratio A, clip(ratio) A) + vf_coef 1/2 mean max((V - target)^2, clipped)

ratio = pi / pi_old of the token, and target = V_old + A by a lambda of the critic's own. GAE is
Schulman et al. 2016, arXiv 1506.02438. Advantages are whitened; rewards are divided by a running
deviation of returns, and never shifted.

What it leaves out: replay, and learning from unfinished texts. They wait and keep the log-probs
that they were sampled with. It does not know which texts share a prompt.

Suffixes: B episodes, T response tokens.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from tokenenv.agents.algorithms.policy_gradient import PolicyGradient, PolicyGradientConfig
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.keywords import AgentKeywords, takes
from tokenenv.agents.learning import losses
from tokenenv.agents.learning.advantages import (
    RunningStd,
    by_turn,
    gae,
    length_adaptive_lambda,
    returns_to_go,
    turn_ends,
    unshaped,
)
from tokenenv.agents.learning.learner import LossFunction, Metrics, Outputs, values_before
from tokenenv.errors import InvalidArgument, check_choice


@dataclass(kw_only=True, slots=True)
class PPOConfig(PolicyGradientConfig):
    """Settings of `PPO`."""

    value_clip: float | None = 0.2
    """Values are clipped to their old ones +- this, in units of (scaled) return, above 0; None does
    not clip."""
    vf_coef: float = 0.5
    """Weight of the value loss; 0 or more."""
    lambda_actor: float = 0.95
    """GAE lambda of the policy's advantages, 0 to 1."""
    lambda_turn: float | None = None
    """The policy's lambda behind a turn, 0 to 1; None: as within it (docs/algorithms.md)."""
    lambda_critic: float = 0.95
    """GAE lambda of the critic's targets, 0 to 1; 1 gives the plain return."""
    lambda_alpha: float | None = None
    """Above 0: the policy's lambda is 1 - 1 / (alpha length) in a text; None: `lambda_actor`."""
    scale_rewards: bool = True
    """Whether rewards are divided by the running deviation of returns; the mean is kept."""
    critic_offset: str | None = None
    """"potential": shaping is taken out of the rewards, and the potential that the env reports is
    added to the critic. Advantages stay the same (up to the scale that `scale_rewards` finds).
    None leaves rewards as they are."""
    separate_value: bool = False
    """Whether the critic has a trunk of its own, or shares the policy's."""

    def __post_init__(self) -> None:
        PolicyGradientConfig.__post_init__(self)
        self.check("above", 0, "value_clip", "lambda_alpha")
        self.check("at least", 0, "vf_coef")
        if self.critic_offset is not None:
            check_choice("critic_offset", self.critic_offset, ("potential",))
        self.check_share("lambda_actor", "lambda_turn", "lambda_critic")


class PPO(PolicyGradient):
    """Proximal policy optimisation with one token as one action."""

    config_class = PPOConfig
    config: PPOConfig
    reads_values = True

    if TYPE_CHECKING:

        @dataclass(kw_only=True)
        class _Keywords(PPOConfig, AgentKeywords): ...

        @takes(_Keywords)
        def __init__(self, envs: VectorEnv, config: Any = None, **keywords: Any) -> None: ...

    def running_statistics(self) -> dict[str, Any]:
        """Return the deviation that rewards are divided by."""
        return {"reward_std": RunningStd()}

    def advantages(self, batch: EpisodeBatch) -> Tensor:
        """Return generalised advantage estimates (B, T). Leave in `batch.learned` the critic's
        "value", for people to look at, and its "old_value" and "target", for the loss."""
        cfg, lengths_B, mask_BT = self.config, batch.response_length_B, batch.mask_BT
        rewards_BT, offset_BT1 = self.offset_rewards(batch)
        scale = 1.0
        if cfg.scale_rewards:
            # Divided by a deviation that holds these returns too, so that the first batch has one.
            running: RunningStd = self.statistics["reward_std"]
            running.update(returns_to_go(rewards_BT, lengths_B, cfg.gamma)[mask_BT])
            scale = running.std
        rewards_BT, offset_BT1 = rewards_BT / scale, offset_BT1 / scale
        own_BT1 = values_before(self.policy, batch, self.updates, cfg.max_batch_tokens)
        values_BT1 = own_BT1 + offset_BT1
        known = rewards_BT, values_BT1, lengths_B, batch.bootstraps_B, cfg.gamma
        # The offset is the potential's part: the critic itself learns only what is left of it.
        batch.learned.update(
            value=scale * values_BT1[:, :-1].masked_fill(~mask_BT, 0.0),
            old_value=own_BT1[:, :-1],
            target=own_BT1[:, :-1] + gae(*known, cfg.lambda_critic),
        )
        return gae(*known, self.policy_lambda(batch))

    def policy_lambda(self, batch: EpisodeBatch) -> float | Tensor:
        """Return the policy's lambda: a number, one per text (B,), or one per token (B, T)."""
        cfg = self.config
        within: float | Tensor = cfg.lambda_actor
        if cfg.lambda_alpha is not None:
            within = length_adaptive_lambda(batch.response_length_B, cfg.lambda_alpha)
        if cfg.lambda_turn is not None:
            within = by_turn(within, cfg.lambda_turn, turn_ends(batch.position_BT1))
        return within

    def offset_rewards(self, batch: EpisodeBatch) -> tuple[Tensor, Tensor]:
        """Return the rewards (B, T) to learn from, and what is added to the critic's values
        (B, T + 1)."""
        rewards_BT, potential_BT1 = self.rewards(batch), batch.potential_BT1
        if self.config.critic_offset is None:
            return rewards_BT, torch.zeros_like(potential_BT1)
        if not self.collector.has_potential:
            raise InvalidArgument(
                "critic_offset='potential' needs an env that reports a potential: a "
                "potential-based design, such as 'delta'."
            )
        lengths_B, gamma = batch.response_length_B, self.config.gamma
        return unshaped(rewards_BT, potential_BT1, lengths_B, gamma), potential_BT1

    def update(self, batch: EpisodeBatch) -> Metrics:
        """Learn from finished episodes; return the field's scalars."""
        metrics, mask_BT = super().update(batch), batch.mask_BT
        values_K, targets_K = batch.learned["old_value"][mask_BT], batch.learned["target"][mask_BT]
        return metrics | {
            "value/explained_variance": losses.explained_variance(values_K, targets_K),
            "value/mean": float(values_K.mean()),
            "value/target": float(targets_K.mean()),
        }

    def loss(self, batch: EpisodeBatch, weights_B: Tensor) -> LossFunction:
        """Return the policy's loss plus the critic's, with `weights_B[b]` for each token of episode
        b."""
        cfg, learned, policy_loss = self.config, batch.learned, super().loss(batch, weights_B)

        def loss(out: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
            total, metrics = policy_loss(out)
            of_tokens = map(out.pick, (learned["old_value"], learned["target"], weights_B))
            value = losses.clipped_value_loss(out.value, *of_tokens, cfg.value_clip)
            return total + cfg.vf_coef * value, metrics | {"loss/value": value}

        return loss
