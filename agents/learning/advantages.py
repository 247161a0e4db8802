"""From rewards to advantages: pure functions of right-padded tensors, and the one running statistic
that they may need.

Suffixes: B episodes, T response tokens of the policy's own. `lengths_B` counts those of each row,
at least 1. What lies right of them is never read, and is zero in every result. `values_BT1` is (B,
T+1): the value of the state before each token, then of the last state.
"""

import math
from typing import Any

import torch
from torch import Tensor

from tokenenv.agents.episodes import token_mask

ROUNDING = 1e-5
"""Numbers whose spread is below this share of their size are taken to be equal: that much is
float32's rounding of sums over a text. Dividing by it would blow rounding up to deviations of 1."""
KL_ROUNDING = 1e-5
"""Nats per token: two forwards of one model in float32 differ by less."""


def kl_penalised(rewards_BT: Tensor, logprobs_BT: Tensor, kl_coef_B: Tensor) -> Tensor:
    """Return the rewards (B, T) with the learner's half of the KL penalty, `-beta log pi`, added.

    `logprobs_BT` are the log-probs that the tokens were sampled with. docs/contract.md defines both
    halves.
    """
    return rewards_BT - kl_coef_B[:, None] * logprobs_BT


def unshaped(
    rewards_BT: Tensor, potentials_BT1: Tensor, lengths_B: Tensor, gamma: float | Tensor
) -> Tensor:
    """Return the rewards (B, T) without potential-based shaping, `gamma Phi(s') - Phi(s)`; `gamma`
    as for `gae`.

    With the potential added to the critic instead, advantages stay the same for every lambda
    (Wiewiora 2003).
    """
    shaping_BT = gamma * potentials_BT1[:, 1:] - potentials_BT1[:, :-1]
    return rewards_BT - shaping_BT.masked_fill(~token_mask(lengths_B, rewards_BT.shape[1]), 0.0)


def gae(
    rewards_BT: Tensor,
    values_BT1: Tensor,
    lengths_B: Tensor,
    bootstrap_B: Tensor,
    gamma: float | Tensor,
    lambda_: float | Tensor,
) -> Tensor:
    """Return generalised advantage estimates (B, T) (Schulman et al. 2016, equation 16).

    `lambda_` is a number, one per row (B,), or one per token (B, T), and `gamma` a number or one
    per token: those of a token weigh what comes after it. `by_turn` makes such of two numbers, one
    within turns and one between them. With lambda 1 and gamma 1 within turns, a turn is one action:
    its first token has the estimate that GAE gives to whole turns (tested). The value of the last
    state counts only where `bootstrap_B` (bool) is True; a terminated episode never has it True.
    """
    # The value after a text's last token counts where the text might have gone on, and only there.
    steps = torch.arange(rewards_BT.shape[1], device=rewards_BT.device)
    ends_BT = (steps == lengths_B[:, None] - 1) & ~bootstrap_B[:, None]
    next_values_BT = values_BT1[:, 1:].masked_fill(ends_BT, 0.0)
    deltas_BT = rewards_BT + gamma * next_values_BT - values_BT1[:, :-1]
    # Zeros right of each text, so that the sum from the right starts at its last token.
    deltas_BT = deltas_BT.masked_fill(~token_mask(lengths_B, len(steps)), 0.0)
    advantages_BT, running_B = torch.zeros_like(deltas_BT), torch.zeros_like(deltas_BT[:, 0])
    for t in reversed(range(len(steps))):
        running_B = deltas_BT[:, t] + _at(gamma, t) * _at(lambda_, t) * running_B
        advantages_BT[:, t] = running_B
    return advantages_BT


def _at(value: float | Tensor, t: int) -> float | Tensor:
    """What holds at token t: a number, or one per row (B,)."""
    return value[:, t] if isinstance(value, Tensor) and value.ndim == 2 else value


def turn_ends(position_BT1: Tensor) -> Tensor:
    """Return bool (B, T): the tokens that are the last of their turns, as something was written
    behind them. `position_BT1` int64 are the places of the tokens in the text, then that of the
    text's end."""
    return position_BT1.diff(dim=1) != 1


def by_turn(within: float | Tensor, across: float, ends_BT: Tensor) -> Tensor:
    """Return (B, T) float32: `within`, a number or one per row (B,), and `across` at the last token
    of each turn, which `ends_BT` (bool) says."""
    within_B1 = torch.as_tensor(within, dtype=torch.float32).reshape(-1, 1)
    return torch.where(ends_BT, torch.tensor(float(across)), within_B1)


def returns_to_go(rewards_BT: Tensor, lengths_B: Tensor, gamma: float | Tensor) -> Tensor:
    """Return the discounted sum (B, T) of each token's reward and those after it, with nothing
    beyond the episode; `gamma` as for `gae`."""
    B, T = rewards_BT.shape
    # With lambda 1, values of 0 and no bootstrap, GAE is the return.
    return gae(rewards_BT, rewards_BT.new_zeros(B, T + 1), lengths_B, lengths_B < 0, gamma, 1.0)


def length_adaptive_lambda(lengths_B: Tensor, alpha: float) -> Tensor:
    """Return one lambda per episode (B,), `1 - 1 / (alpha length)` clamped to [0, 1] (VAPO, Yue et
    al. 2025, arXiv 2504.05118)."""
    return (1.0 - 1.0 / (alpha * lengths_B.float())).clamp(0.0, 1.0)


def whiten(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the values (B, T) shifted and scaled to mean 0 and deviation 1 over the tokens in
    `mask_BT`; zero outside. All are zero where the values are the same up to rounding."""
    # Over the tokens alone: zeros right of short texts would pull the mean and shrink the spread.
    valid = values_BT[mask_BT]
    std, mean = torch.std_mean(valid, correction=0)
    if std <= ROUNDING * valid.abs().max():
        return torch.zeros_like(values_BT)
    return ((values_BT - mean) / std).masked_fill(~mask_BT, 0.0)


class RunningStd:
    """The standard deviation of everything seen so far (Chan et al. 1979), to divide rewards by.

    Rewards are divided and never shifted. Subtracting a mean m from each token's reward would
    change a text's return by `-m length`: a price on length that nobody asked for (a bonus, where m
    is negative).
    """

    def __init__(self) -> None:
        self.count, self.mean, self.sum_squares = 0, 0.0, 0.0

    def update(self, values_K: Tensor) -> None:
        """Take in K more values (K,), in float64."""
        count, values_K = values_K.numel(), values_K.double()
        mean, total = float(values_K.mean()), self.count + count
        shift = mean - self.mean
        spread = float(((values_K - mean) ** 2).sum())
        self.sum_squares += spread + shift**2 * self.count * count / total
        self.mean += shift * count / total
        self.count = total

    @property
    def std(self) -> float:
        """Return the standard deviation, or 1 while all values seen are equal."""
        spread = math.sqrt(self.sum_squares / max(self.count, 1))
        return spread if spread > 1e-6 * max(1.0, abs(self.mean)) else 1.0

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a checkpoint needs."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict()` returned."""
        vars(self).update(state)
