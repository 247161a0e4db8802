"""A2C: advantage actor-critic (Mnih et al. 2016), which is PPO with one step a batch and no clip.

What it does: everything PPO does before its loss (dense rewards with the whole KL penalty,
per-token advantages, a critic); then a single gradient step on -A log pi, with returns to the end
of the text and advantages that are not whitened.

What it leaves out: the ratio to the policy that sampled the text. Episodes that began before an
update are a few tokens stale, which PPO's ratio corrects and A2C does not.
"""

from dataclasses import dataclass

from tokenenv.agents.algorithms.ppo import PPO, PPOConfig


@dataclass(kw_only=True, slots=True)
class A2CConfig(PPOConfig):
    """Settings of `A2C`: PPO's, with other defaults."""

    epochs: int = 1
    """Passes over each batch; 1 or more."""
    minibatches: int = 1
    """Optimizer steps per pass; 1 or more."""
    batch_tokens: int = 512
    """Response tokens of finished episodes that one update learns from, at least; 1 or more."""
    clip_range: float | None = None
    """Above 0: the policy ratio is clipped to 1 +- this; None takes no ratio: plain -A log pi."""
    value_clip: float | None = None
    """Above 0: values are clipped to their old ones +- this, in units of (scaled) return; None does
    not clip."""
    lambda_actor: float = 1.0
    """GAE lambda of the policy's advantages, 0 to 1."""
    lambda_critic: float = 1.0
    """GAE lambda of the critic's targets, 0 to 1; 1 gives the plain return."""
    whiten: bool = False
    """Whether advantages are brought to mean 0 and deviation 1 over the batch's tokens."""


class A2C(PPO):
    """Advantage actor-critic with one token as one action."""

    config_class = A2CConfig
    config: A2CConfig
