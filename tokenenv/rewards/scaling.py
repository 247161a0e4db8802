"""Wrappers around any reward term: divided by a running scale, normalised by position, clipped."""

import copy
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from tokenenv.errors import InvalidArgument
from tokenenv.rewards.designs import Design, make_terms
from tokenenv.rewards.term import Context, FinishedTexts, RewardTerm, States, Transitions

Seen = TypeVar("Seen", States, FinishedTexts)

TAKEN_OVER = (
    "kind",
    "needs",
    "models",
    "pays_score",
    "has_memory",
    "memory_shape",
    "memory_dtype",
    "has_potential",
    "preserves_return",
    "preserves_gradient",
)


class Wrapper(RewardTerm):
    """A term that changes another term's rewards, under the other's name unless it is given one.

    Wrappers compose. Each binds a copy of its term, so that one object may serve several envs. A
    wrapper's statistics are those of its term followed by its own.
    """

    breaks: tuple[str, ...] = ("has_potential", "preserves_return", "preserves_gradient")
    """What the wrapped term has and the changed one has not; a wrapper that keeps more says so."""
    _num_inner = 0

    def __init__(self, term: Design) -> None:
        terms = list(make_terms(term).values())
        if len(terms) != 1:
            raise InvalidArgument(
                f"{type(self).__name__} takes one term and {term!r} has {len(terms)}; wrap each of "
                f"them."
            )
        self.term = terms[0]
        self.name, self.weight = self.term.name, self.term.weight
        self._take_over()

    def _take_over(self) -> None:
        for attribute in TAKEN_OVER:
            setattr(self, attribute, attribute not in self.breaks and getattr(self.term, attribute))

    def bind(self, context: Context) -> None:
        """Binds a copy of the wrapped term, under this term's name."""
        self.term = copy.copy(self.term)
        self.term.name = self.name
        self.term.bind(context)
        self._take_over()
        inner = self.term.statistics()
        self._num_inner = 0 if inner is None else len(inner)

    def change(self, rewards: Tensor, step: Tensor, own: Tensor) -> Tensor:
        """`rewards` of the tokens after `step` response tokens, changed; `own` (..., p) are the
        wrapper's statistics when the texts began. All broadcast."""
        raise TypeError(f"{type(self).__name__} does not define change()")

    def learn(self, rewards: Tensor, step: Tensor, mask: Tensor) -> None:
        """Takes in the wrapped term's rewards, of one shape with `step`, where `mask`."""

    def own_statistics(self) -> Tensor | None:
        """The wrapper's part of the statistics."""
        return None

    def reward(self, batch: Transitions) -> Tensor:
        """(K,): the term's rewards, changed."""
        finished = None if batch.finished is None else self._inside(batch.finished)
        inner = replace(
            batch,
            before=self._inside(batch.before),
            after=self._inside(batch.after),
            finished=finished,
        )
        rewards = self.term.reward(inner)
        if batch.learning is not None:
            self.learn(rewards, batch.before.step, batch.learning)
        return self.change(rewards, batch.before.step, self._own(batch.before, rewards))

    def place(self, texts: FinishedTexts, max_new_tokens: int) -> Tensor:
        """(B, T): the term's placed rewards, changed."""
        rewards = self.term.place(self._inside(texts), max_new_tokens)
        step = torch.arange(max_new_tokens, device=rewards.device).expand(rewards.shape)
        if texts.learning:
            self.learn(rewards, step, texts.earning_mask(self, max_new_tokens))
        return self.change(rewards, step, self._own(texts, rewards)[:, None])

    def remember(self, memory: Tensor | None, tokens: Tensor, states: States) -> Tensor:
        """(K,): what the wrapped term carries."""
        return self.term.remember(memory, tokens, self._inside(states))

    def statistics(self) -> Tensor | None:
        """(p,): the wrapped term's, then the wrapper's own."""
        parts = [
            part for part in (self.term.statistics(), self.own_statistics()) if part is not None
        ]
        return torch.cat(parts) if parts else None

    def save_statistics(self) -> Tensor | np.ndarray | None:
        """What the wrapped term saves."""
        return self.term.save_statistics()

    def load_statistics(self, saved: Tensor | np.ndarray) -> None:
        """Goes on from what `save_statistics` returned."""
        self.term.load_statistics(saved)

    def _inside(self, seen: Seen) -> Seen:
        """`seen` with the wrapped term's statistics alone."""
        if not self._num_inner:
            return seen
        return replace(
            seen,
            statistics={
                **seen.statistics,
                self.name: seen.statistics[self.name][:, : self._num_inner],
            },
        )

    def _own(self, seen: States | FinishedTexts, rewards: Tensor) -> Tensor:
        """(K, p) the wrapper's part of the statistics that the texts began with."""
        every = seen.statistics.get(self.name)
        return rewards.new_zeros(len(rewards), 0) if every is None else every[:, self._num_inner :]


class Clipped(Wrapper):
    """Each token's reward, clipped to [low, high]. Preserves neither the return nor the gradient,
    whatever it wraps, and is no longer potential-based."""

    def __init__(self, term: Design, low: float, high: float) -> None:
        if not low < high:
            raise InvalidArgument(
                f"low={low} and high={high} are not allowed; low must be less than high."
            )
        self.low, self.high = low, high
        super().__init__(term)

    def change(self, rewards: Tensor, step: Tensor, own: Tensor) -> Tensor:
        """The rewards within the bounds."""
        return rewards.clamp(self.low, self.high)


class _Learned(Wrapper):
    """A wrapper that learns from its term's unchanged rewards while stepping. Rewards that are not
    finite teach nothing."""

    per_position = False

    def bind(self, context: Context) -> None:
        """Starts with nothing seen."""
        super().bind(context)
        self._max_new_tokens = context.spec.max_new_tokens
        self._moments = torch.zeros(
            3, self._max_new_tokens if self.per_position else 1, dtype=torch.float64
        )
        self._moments = self._moments.to(context.device)

    def learn(self, rewards: Tensor, step: Tensor, mask: Tensor) -> None:
        """Updates the moments."""
        bins = step.clamp(max=self._moments.shape[1] - 1).flatten()
        self._moments = updated_moments(self._moments, rewards.flatten(), bins, mask.flatten())

    def save_statistics(self) -> Tensor:
        """The wrapped term's, then the moments, as one row of numbers."""
        inner = self.term.save_statistics()
        own = self._moments.flatten()
        return (
            own
            if inner is None
            else torch.cat([torch.as_tensor(inner).to(own.device).flatten(), own])
        )

    def load_statistics(self, saved: Tensor | np.ndarray) -> None:
        """Goes on from what `save_statistics` returned."""
        inner, size = self.term.save_statistics(), self._moments.numel()
        if inner is not None:
            self.term.load_statistics(saved[:-size].reshape(inner.shape))
        self._moments = torch.as_tensor(saved[-size:]).to(self._moments).view_as(self._moments)


class Scaled(_Learned):
    """r_t / s, with s the running standard deviation of the term's rewards per token, as it was
    when the text began.

    Never shifts: subtracting a mean m would change each return by -m length, a hidden price on
    length. s is 1 while fewer than two different rewards were seen. Within a text s is a positive
    constant that none of its tokens had a part in, so what the term does for the gradient is kept
    up to a positive factor (and its potential is divided by s too); the return is the score no
    longer.
    """

    breaks = ("preserves_return",)

    def own_statistics(self) -> Tensor:
        """(1,) float32: the running standard deviation."""
        scale = deviation(*self._moments)
        return torch.where(scale > 0, scale, 1.0).float()

    def change(self, rewards: Tensor, step: Tensor, own: Tensor) -> Tensor:
        """The rewards divided by the scale."""
        return rewards / own[..., 0]

    def potential(self, states: States) -> Tensor:
        """(K,): the term's potential, divided by the same scale."""
        potential = self.term.potential(self._inside(states))
        return potential / self._own(states, potential)[:, 0]


class PositionScaled(_Learned):
    """(r_t - a (log p - m)) / (c log p + d), with p = (t + 1) / max_new_tokens the place of the
    token in the longest text.

    The location-aware normaliser of Yin et al. 2025 (arXiv 2501.02790): a causal reward model's
    scores drift along the text, and so do their deviations. Both lines are fitted by least squares
    to the mean and the standard deviation of the rewards seen at each position, weighted by how
    many those are; the divisor is at least a tenth of the deviation within positions. The paper's p
    needs the text's final length; with the largest one this is causal.

    Only the drift is taken out, and m is such that all that is subtracted, in units of what is
    paid, adds up to zero over a text of the largest length. A shorter text still keeps part of it,
    so this preserves neither return nor gradient; where texts differ in length, `Scaled` is the
    safe choice. Every token is paid its shift, also by a term that pays at the end alone.
    """

    per_position = True

    def own_statistics(self) -> Tensor:
        """(5,) float32: a, m, c, d and the least divisor."""
        count, mean, squares = self._moments
        log_p = self._log_p(
            torch.arange(self._max_new_tokens, dtype=torch.float64, device=count.device)
        )
        a, _ = line(log_p, mean, count)
        c, d = line(log_p, (squares / count.clamp(min=1)).sqrt(), count * (count > 1))
        within = deviation(
            count.sum(), (count * mean).sum() / count.sum().clamp(min=1), squares.sum()
        )
        c, d, within = (
            torch.where(within > 0, x, x0) for x, x0 in ((c, 0.0), (d, 1.0), (within, 1.0))
        )
        share = 1 / torch.maximum(c * log_p + d, 0.1 * within)
        return torch.stack([a, (share * log_p).sum() / share.sum(), c, d, 0.1 * within]).float()

    def change(self, rewards: Tensor, step: Tensor, own: Tensor) -> Tensor:
        """The rewards without their drift, divided by the deviation at their position."""
        a, m, c, d, least = own.unbind(-1)
        log_p = self._log_p(step)
        return (rewards - a * (log_p - m)) / torch.maximum(c * log_p + d, least)

    def _log_p(self, step: Tensor) -> Tensor:
        return ((step + 1) / self._max_new_tokens).log()


def updated_moments(moments: Tensor, values: Tensor, bins: Tensor, mask: Tensor) -> Tensor:
    """Count, mean and sum of squared deviations (3, bins) float64 after `values` (K,) have been
    added to the bins they name, (K,) int64, where `mask` (K,) and they are finite (Chan et al.
    1979). Nothing waits for the device."""

    def sums(weighted: Tensor) -> Tensor:
        return torch.zeros_like(moments[0]).index_add(0, bins, weighted)

    taken = mask & values.isfinite()
    weight, values = taken.double(), torch.where(taken, values, 0.0).double()
    new = sums(weight)
    new_mean = sums(weight * values) / new.clamp(min=1)
    new_squares = sums(weight * (values - new_mean[bins]).square())
    count, mean, squares = moments
    total = (count + new).clamp(min=1)
    shift = new_mean - mean
    return torch.stack(
        [
            count + new,
            mean + shift * new / total,
            squares + new_squares + shift.square() * count * new / total,
        ]
    )


def deviation(count: Tensor, mean: Tensor, squares: Tensor) -> Tensor:
    """The standard deviation, 0 where it is no more than rounding."""
    spread = (squares / count.clamp(min=1)).sqrt()
    # What float32 cannot hold is no spread to divide by.
    return torch.where(
        spread > (1e-6 * mean.abs()).clamp(min=torch.finfo(torch.float32).tiny), spread, 0.0
    )


def line(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and intercept of the weighted least squares of y on x, all (n,); level where only one x
    has weight."""
    total = weight.sum().clamp(min=1)
    mean_x, mean_y = (weight * x).sum() / total, (weight * y).sum() / total
    spread = (weight * (x - mean_x).square()).sum()
    slope = (weight * (x - mean_x) * (y - mean_y)).sum() / spread
    slope = torch.where(spread > 1e-12, slope, 0.0)
    return slope, mean_y - slope * mean_x
