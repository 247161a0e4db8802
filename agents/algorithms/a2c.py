"""A2C: advantage actor-critic (Mnih et al. 2016, arXiv 1602.01783), which is PPO with one step a
batch and no clip.

What it does: everything that PPO does before its loss (dense rewards with the whole KL penalty,
advantages per token, a critic), then a single gradient step on

    L = -mean A_t log pi(y_t | s_t),      A_t = sum_{k >= t} gamma^(k-t) r_k - V(s_t)

with returns to the end of the text (lambda 1) and advantages that are not whitened.

What it leaves out: the ratio to the policy that sampled the text. Episodes that began before an
update are a few tokens stale; PPO's ratio corrects that, and A2C does not (`importance_cap` does).
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
