"""PPO on single tokens.

What it does: any dense reward the env pays, with the learner's half of the KL penalty added; per-token generalised
advantage estimates with a lambda for the policy and one for the critic, or one that adapts to each text's length;
advantages whitened over the batch; rewards divided by a running deviation, never shifted; clipped policy and value
losses; minibatches of whole texts; an early stop on KL; entropy and full-vocabulary KL as optional losses.

What it leaves out: replay, learning from unfinished texts (they wait, keeping the log-probabilities they were sampled
with), and more than one process.

Suffixes: B episodes, T response tokens, K response tokens of one micro-batch, flat.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenenv.errors import InvalidArgument, check_choice

from . import losses
from .advantages import RunningStd, gae, length_adaptive_lambda, returns_to_go, unshaped, whiten
from .agent import Agent
from .config import AgentConfig
from .episodes import EpisodeBatch
from .learner import LossFunction, Metrics, Outputs, state_values


@dataclass(kw_only=True, slots=True)
class PPOConfig(AgentConfig):
    """Settings of `PPO`."""

    clip_range: float = 0.2
    """The policy ratio is clipped to 1 +- this; above 0."""
    value_clip: float | None = 0.2
    """Values are clipped to their old ones +- this, in units of (scaled) return, above 0; None does not clip."""
    vf_coef: float = 0.5
    """Weight of the value loss; 0 or more."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, in nats per token; 0 or more. It looks one token ahead only, unlike the KL reward."""
    gamma: float = 1.0
    """Discount per token, 0 to 1."""
    lambda_actor: float = 0.95
    """GAE lambda of the policy's advantages, 0 to 1."""
    lambda_critic: float = 0.95
    """GAE lambda of the critic's targets, 0 to 1; 1 gives the plain return."""
    lambda_alpha: float | None = None
    """Above 0: the policy's lambda is 1 - 1 / (alpha length) for each text, in place of `lambda_actor`; None is off."""
    whiten: bool = True
    """Whether advantages are brought to mean 0 and deviation 1 over the batch's tokens."""
    scale_rewards: bool = True
    """Whether rewards are divided by the running deviation of returns; the mean is kept."""
    critic_offset: str | None = None
    """"potential": shaping is taken out of the rewards, and the potential that the env reports added to the critic: the
    same advantages from unshaped rewards (up to the scale that `scale_rewards` finds); None leaves rewards as they are."""
    separate_value: bool = False
    """Whether the critic has a trunk of its own, or shares the policy's."""

    def __post_init__(self) -> None:
        AgentConfig.__post_init__(self)
        self.check("above", 0, "clip_range", "value_clip", "lambda_alpha")
        self.check("at least", 0, "vf_coef", "entropy_coef")
        if self.critic_offset is not None:
            check_choice("critic_offset", self.critic_offset, ("potential",))
        self.check_share("gamma", "lambda_actor", "lambda_critic")


class PPO(Agent):
    """Proximal policy optimisation (Schulman et al. 2017) with one token as one action."""

    config_class = PPOConfig
    config: PPOConfig

    def running_statistics(self) -> dict[str, Any]:
        """The deviation that rewards are divided by."""
        return {"reward_std": RunningStd()}

    def update(self, batch: EpisodeBatch) -> Metrics:
        """Learns from finished episodes; returns the field's scalars."""
        cfg, lengths_B, mask_BT = self.config, batch.response_length_B, batch.mask_BT
        rewards_BT, offset_BT1 = self.offset_rewards(batch)
        if cfg.scale_rewards:
            running: RunningStd = self.statistics["reward_std"]
            running.update(returns_to_go(rewards_BT, lengths_B, cfg.gamma)[mask_BT])
            rewards_BT, offset_BT1 = rewards_BT / running.std, offset_BT1 / running.std
        own_BT1 = state_values(self.policy, batch, cfg.max_batch_tokens)
        values_BT, values_BT1, bootstrap_B = own_BT1[:, :-1], own_BT1 + offset_BT1, self.bootstrap(batch)
        lambda_B = cfg.lambda_actor if cfg.lambda_alpha is None else length_adaptive_lambda(lengths_B, cfg.lambda_alpha)
        advantages_BT = gae(rewards_BT, values_BT1, lengths_B, bootstrap_B, cfg.gamma, lambda_B)
        targets_BT = gae(rewards_BT, values_BT1, lengths_B, bootstrap_B, cfg.gamma, cfg.lambda_critic) + values_BT
        if cfg.whiten:
            advantages_BT = whiten(advantages_BT, mask_BT)
        metrics = self.optimise(batch, lambda weights_B: self.loss(batch, advantages_BT, values_BT, targets_BT, weights_B))
        return metrics | {
            "value/explained_variance": losses.explained_variance(values_BT[mask_BT], targets_BT[mask_BT]),
            "value/mean": float(values_BT[mask_BT].mean()),
            "value/target": float(targets_BT[mask_BT].mean()),
        }

    def offset_rewards(self, batch: EpisodeBatch) -> tuple[Tensor, Tensor]:
        """The rewards (B, T) to learn from, and what is added to the critic's values (B, T + 1)."""
        rewards_BT, potential_BT1 = self.rewards(batch), batch.potential_BT1
        if self.config.critic_offset is None:
            return rewards_BT, torch.zeros_like(potential_BT1)
        if not self.collector.has_potential:
            raise InvalidArgument(
                "critic_offset='potential' needs an env that reports a potential: a potential-based design, such as 'delta'."
            )
        return unshaped(rewards_BT, potential_BT1, batch.response_length_B, self.config.gamma), potential_BT1

    def loss(
        self, batch: EpisodeBatch, advantages_BT: Tensor, values_BT: Tensor, targets_BT: Tensor, weights_B: Tensor
    ) -> LossFunction:
        """The loss of one minibatch, in which a token of episode b counts `weights_B[b]`."""
        cfg = self.config

        def loss(out: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
            weights, old = out.pick(weights_B), out.pick(batch.logprob_BT)
            policy = losses.clipped_policy_loss(out.logprob, old, out.pick(advantages_BT), weights, cfg.clip_range)
            value = losses.clipped_value_loss(out.value, out.pick(values_BT), out.pick(targets_BT), weights, cfg.value_clip)
            entropy, ref_kl = (weights * out.entropy).sum(), (weights * out.ref_kl).sum()
            total = policy + cfg.vf_coef * value - cfg.entropy_coef * entropy + cfg.full_kl_coef * ref_kl
            with torch.no_grad():
                metrics = {
                    "loss/policy": policy,
                    "loss/value": value,
                    "policy/entropy": entropy,
                    "policy/approx_kl": losses.approx_kl(out.logprob, old, weights),
                    "policy/clip_fraction": losses.clip_fraction(out.logprob, old, weights, cfg.clip_range),
                }
            return total, metrics | ({"loss/full_kl": ref_kl} if cfg.full_kl_coef else {})

        return loss
