"""Rewards to advantages: pure functions on right-padded tensors, and the one running statistic they
may need.

Suffixes: B episodes, T response tokens. `lengths_B` counts each row's response tokens (at least 1);
whatever lies right of it is never read, and comes out as zero. `values_BT1` is (B, T+1): the value
of the state before each token, then of the last state.
"""

import math
from typing import Any

import torch
from torch import Tensor

from tokenenv.agents.episodes import token_mask

ROUNDING = 1e-5
"""A spread below this share of the numbers that spread is float32's rounding of sums over a text,
and is not divided by."""
KL_ROUNDING = 1e-5
"""Nats per token: two forwards of one model in float32 differ by less."""


def kl_penalised(rewards_BT: Tensor, logprobs_BT: Tensor, kl_coef_B: Tensor) -> Tensor:
    """Adds the learner's half of the k1 penalty, `-beta log pi`, to rewards that hold the env's
    half, `+beta log pi_ref`.

    `logprobs_BT` are those the tokens were sampled with; together both halves are exactly `-beta
    (log pi - log pi_ref)`.
    """
    return rewards_BT - kl_coef_B[:, None] * logprobs_BT


def unshaped(rewards_BT: Tensor, potentials_BT1: Tensor, lengths_B: Tensor, gamma: float) -> Tensor:
    """Takes potential-based shaping, `gamma Phi(s') - Phi(s)`, out of the rewards. With the
    potential added to the critic instead, advantages stay the same for every lambda (Wiewiora
    2003)."""
    shaping_BT = gamma * potentials_BT1[:, 1:] - potentials_BT1[:, :-1]
    return rewards_BT - shaping_BT.masked_fill(~token_mask(lengths_B, rewards_BT.shape[1]), 0.0)


def gae(
    rewards_BT: Tensor,
    values_BT1: Tensor,
    lengths_B: Tensor,
    bootstrap_B: Tensor,
    gamma: float,
    lambda_: float | Tensor,
) -> Tensor:
    """Generalised advantage estimates (B, T) (Schulman et al. 2016, equation 16); `lambda_` is a
    number or one per row (B,).

    The value of the last state counts only where `bootstrap_B` (bool): a terminated episode never
    has it True.
    """
    steps = torch.arange(rewards_BT.shape[1], device=rewards_BT.device)
    ends_BT = (steps == lengths_B[:, None] - 1) & ~bootstrap_B[:, None]
    next_values_BT = values_BT1[:, 1:].masked_fill(ends_BT, 0.0)
    deltas_BT = rewards_BT + gamma * next_values_BT - values_BT1[:, :-1]
    deltas_BT = deltas_BT.masked_fill(~token_mask(lengths_B, len(steps)), 0.0)
    advantages_BT, running_B = torch.zeros_like(deltas_BT), torch.zeros_like(deltas_BT[:, 0])
    for t in reversed(range(len(steps))):
        running_B = deltas_BT[:, t] + gamma * lambda_ * running_B
        advantages_BT[:, t] = running_B
    return advantages_BT


def returns_to_go(rewards_BT: Tensor, lengths_B: Tensor, gamma: float) -> Tensor:
    """The discounted sum (B, T) of each token's reward and those after it, with nothing beyond the
    episode."""
    B, T = rewards_BT.shape
    return gae(rewards_BT, rewards_BT.new_zeros(B, T + 1), lengths_B, lengths_B < 0, gamma, 1.0)


def length_adaptive_lambda(lengths_B: Tensor, alpha: float) -> Tensor:
    """One lambda per episode, `1 - 1 / (alpha length)` clamped to [0, 1] (VAPO, Yue et al. 2025,
    arXiv 2504.05118)."""
    return (1.0 - 1.0 / (alpha * lengths_B.float())).clamp(0.0, 1.0)


def whiten(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Shifts and scales to mean 0 and standard deviation 1 over the tokens in `mask_BT`; zero
    outside, and everywhere where the values are the same up to rounding."""
    valid = values_BT[mask_BT]
    std, mean = torch.std_mean(valid, correction=0)
    if std <= ROUNDING * valid.abs().max():
        return torch.zeros_like(values_BT)
    return ((values_BT - mean) / std).masked_fill(~mask_BT, 0.0)


class RunningStd:
    """The standard deviation of everything seen so far (Chan et al. 1979), to divide rewards by.

    Rewards are divided and never shifted: subtracting a mean m would change each return by `-m
    length`, a hidden price on length.
    """

    def __init__(self) -> None:
        self.count, self.mean, self.sum_squares = 0, 0.0, 0.0

    def update(self, values_K: Tensor) -> None:
        """Takes in K more values."""
        count, values_K = values_K.numel(), values_K.double()
        mean, total = float(values_K.mean()), self.count + count
        shift = mean - self.mean
        self.sum_squares += (
            float(((values_K - mean) ** 2).sum()) + shift**2 * self.count * count / total
        )
        self.mean += shift * count / total
        self.count = total

    @property
    def std(self) -> float:
        """The standard deviation, or 1 while all values seen are equal."""
        spread = math.sqrt(self.sum_squares / max(self.count, 1))
        return spread if spread > 1e-6 * max(1.0, abs(self.mean)) else 1.0

    def state_dict(self) -> dict[str, Any]:
        """Everything a checkpoint needs."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict()`."""
        vars(self).update(state)
