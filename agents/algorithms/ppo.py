"""PPO on single tokens.

What it does: any dense reward the env pays, with the learner's half of the KL penalty added;
per-token generalised advantage estimates with a lambda for the policy and one for the critic, or
one that adapts to each text's length; advantages whitened over the batch; rewards divided by a
running deviation, never shifted; clipped policy and value losses; minibatches of whole texts; an
early stop on KL; entropy and full-vocabulary KL as optional losses.

What it leaves out: replay, learning from unfinished texts (they wait, keeping the log-probabilities
they were sampled with), and more than one process.

Suffixes: B episodes, T response tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenenv.agents.algorithms.policy_gradient import PolicyGradient, PolicyGradientConfig
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.learning import losses
from tokenenv.agents.learning.advantages import (
    RunningStd,
    gae,
    length_adaptive_lambda,
    returns_to_go,
    unshaped,
)
from tokenenv.agents.learning.learner import LossFunction, Metrics, Outputs, state_values
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
    lambda_critic: float = 0.95
    """GAE lambda of the critic's targets, 0 to 1; 1 gives the plain return."""
    lambda_alpha: float | None = None
    """Above 0: the policy's lambda is 1 - 1 / (alpha length) for each text, in place of
    `lambda_actor`; None is off."""
    scale_rewards: bool = True
    """Whether rewards are divided by the running deviation of returns; the mean is kept."""
    critic_offset: str | None = None
    """"potential": shaping is taken out of the rewards, and the potential that the env reports
    added to the critic: the same advantages from unshaped rewards (up to the scale that
    `scale_rewards` finds); None leaves rewards as they are."""
    separate_value: bool = False
    """Whether the critic has a trunk of its own, or shares the policy's."""

    def __post_init__(self) -> None:
        PolicyGradientConfig.__post_init__(self)
        self.check("above", 0, "value_clip", "lambda_alpha")
        self.check("at least", 0, "vf_coef")
        if self.critic_offset is not None:
            check_choice("critic_offset", self.critic_offset, ("potential",))
        self.check_share("lambda_actor", "lambda_critic")


class PPO(PolicyGradient):
    """Proximal policy optimisation (Schulman et al. 2017) with one token as one action."""

    config_class = PPOConfig
    config: PPOConfig

    def running_statistics(self) -> dict[str, Any]:
        """The deviation that rewards are divided by."""
        return {"reward_std": RunningStd()}

    def advantages(self, batch: EpisodeBatch) -> Tensor:
        """Generalised advantage estimates; leaves the critic's values and what they are to
        become."""
        cfg, lengths_B = self.config, batch.response_length_B
        rewards_BT, offset_BT1 = self.offset_rewards(batch)
        scale = self.reward_scale(rewards_BT, batch)
        rewards_BT, offset_BT1 = rewards_BT / scale, offset_BT1 / scale
        own_BT1 = state_values(self.policy, batch, cfg.max_batch_tokens)
        values_BT1, bootstrap_B = own_BT1 + offset_BT1, batch.bootstraps_B
        lambda_B = (
            cfg.lambda_actor
            if cfg.lambda_alpha is None
            else length_adaptive_lambda(lengths_B, cfg.lambda_alpha)
        )
        errors_BT = gae(
            rewards_BT, values_BT1, lengths_B, bootstrap_B, cfg.gamma, cfg.lambda_critic
        )
        batch.learned.update(
            value=scale * values_BT1[:, :-1].masked_fill(~batch.mask_BT, 0.0),
            old_value=own_BT1[:, :-1],
            target=own_BT1[:, :-1] + errors_BT,
        )
        return gae(rewards_BT, values_BT1, lengths_B, bootstrap_B, cfg.gamma, lambda_B)

    def offset_rewards(self, batch: EpisodeBatch) -> tuple[Tensor, Tensor]:
        """The rewards (B, T) to learn from, and what is added to the critic's values (B, T + 1)."""
        rewards_BT, potential_BT1 = self.rewards(batch), batch.potential_BT1
        if self.config.critic_offset is None:
            return rewards_BT, torch.zeros_like(potential_BT1)
        if not self.collector.has_potential:
            raise InvalidArgument(
                "critic_offset='potential' needs an env that reports a potential: a "
                "potential-based design, such as 'delta'."
            )
        return unshaped(
            rewards_BT, potential_BT1, batch.response_length_B, self.config.gamma
        ), potential_BT1

    def reward_scale(self, rewards_BT: Tensor, batch: EpisodeBatch) -> float:
        """The running deviation of returns, these included; 1 where rewards are not scaled."""
        if not self.config.scale_rewards:
            return 1.0
        running: RunningStd = self.statistics["reward_std"]
        running.update(
            returns_to_go(rewards_BT, batch.response_length_B, self.config.gamma)[batch.mask_BT]
        )
        return running.std

    def update(self, batch: EpisodeBatch) -> Metrics:
        """Learns from finished episodes; returns the field's scalars."""
        metrics, mask_BT = super().update(batch), batch.mask_BT
        values_K, targets_K = batch.learned["old_value"][mask_BT], batch.learned["target"][mask_BT]
        return metrics | {
            "value/explained_variance": losses.explained_variance(values_K, targets_K),
            "value/mean": float(values_K.mean()),
            "value/target": float(targets_K.mean()),
        }

    def loss(self, batch: EpisodeBatch, weights_B: Tensor) -> LossFunction:
        """The policy's loss and the critic's, with `weights_B[b]` for each token of episode b."""
        cfg, policy_loss = self.config, super().loss(batch, weights_B)

        def loss(out: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
            total, metrics = policy_loss(out)
            old, target = out.pick(batch.learned["old_value"]), out.pick(batch.learned["target"])
            value = losses.clipped_value_loss(
                out.value, old, target, out.pick(weights_B), cfg.value_clip
            )
            return total + cfg.vf_coef * value, metrics | {"loss/value": value}

        return loss
