"""Terms that change another term's rewards: `Scaled`, `PositionScaled` and `Clipped`."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenenv.errors import InvalidArgument
from tokenenv.rewards.designs import Design, make_terms
from tokenenv.rewards.seen import FinishedTexts, States, Transitions
from tokenenv.rewards.term import Context, RewardTerm


def _follows(attribute: str) -> Any:
    """A property that is the wrapped term's attribute, as it is now (binding may change it), or
    False where the wrapper breaks what it promises."""
    return property(
        lambda wrapper: attribute not in wrapper.breaks and getattr(wrapper.term, attribute)
    )


class Wrapper(RewardTerm):
    """A term that changes another term's rewards, under the other's name unless it is given one.

    The wrapped term is a term like any other: it is bound under the name "NAME/inner", where its
    memory and its statistics stand, and the wrapper's own statistics stand under NAME. Wrappers
    compose. Each binds a copy of its term, so that one object may serve several envs.

    A wrapper of your own defines `change`. If it learns from what it sees, it also defines `learn`,
    `statistics`, `save_statistics` and `load_statistics`.
    """

    breaks: tuple[str, ...] = ("has_potential", "preserves_return", "preserves_gradient")
    """The promises of the wrapped term that do not hold for the changed rewards. A wrapper that
    keeps more of them names fewer here."""
    kind = _follows("kind")
    needs = _follows("needs")
    models = _follows("models")
    pays_score = _follows("pays_score")
    has_potential = _follows("has_potential")
    preserves_return = _follows("preserves_return")
    preserves_gradient = _follows("preserves_gradient")

    def __init__(self, term: Design) -> None:
        terms = list(make_terms(term).values())
        if len(terms) != 1:
            raise InvalidArgument(
                f"{type(self).__name__} takes one term and {term!r} has {len(terms)}; wrap each of "
                f"them."
            )
        self.term = terms[0]
        self.name, self.weight = self.term.name, self.term.weight

    def bind(self, context: Context) -> None:
        """Binds a copy of the wrapped term, under a name of its own."""
        super().bind(context)
        if hasattr(self, "own_statistics"):
            raise InvalidArgument(
                f"{type(self).__name__} defines own_statistics, which is called statistics now."
            )
        self.term = copy.copy(self.term)
        self.term.name = f"{self.name}/inner"
        self.term.bind(context)

    def wrapped(self) -> Sequence[RewardTerm]:
        """Return the wrapped term, and what it wraps itself."""
        return (self.term, *self.term.wrapped())

    def change(self, rewards: Tensor, step: Tensor, own: Tensor) -> Tensor:
        """Return `rewards` of the tokens after `step` response tokens, changed; `own` (..., p) are
        the wrapper's statistics when the texts began, p = 0 where it has none. All broadcast."""
        raise TypeError(f"{type(self).__name__} does not define change()")

    def learn(self, rewards: Tensor, step: Tensor, mask: Tensor) -> None:
        """Takes in the wrapped term's rewards, of one shape with `step`, where `mask`."""

    def reward(self, batch: Transitions) -> Tensor:
        """(K,): the term's rewards, changed."""
        rewards, step = self.term.reward(batch), batch.before.step
        # The batch holds the statistics that its texts began with: learning first changes nothing.
        if batch.learning is not None:
            self.learn(rewards, step, batch.learning)
        return self.change(rewards, step, self._own(batch.statistics, rewards))

    def place(self, texts: FinishedTexts, max_new_tokens: int) -> Tensor:
        """(B, T): the term's placed rewards, changed."""
        rewards = self.term.place(texts, max_new_tokens)
        step = torch.arange(max_new_tokens, device=rewards.device).expand(rewards.shape)
        if texts.learning:
            self.learn(rewards, step, texts.earning_mask(self, max_new_tokens))
        return self.change(rewards, step, self._own(texts.statistics, rewards)[:, None])

    def _own(self, statistics: dict[str, Tensor], rewards: Tensor) -> Tensor:
        """(K, p) the wrapper's statistics when the texts of `rewards` (K, ...) began."""
        own = statistics.get(self.name)
        return rewards.new_zeros(len(rewards), 0) if own is None else own


class Clipped(Wrapper):
    """Each token's reward, clipped to [low, high].

    It preserves neither the return nor the gradient, whatever it wraps, and is not potential-based.
    """

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
    """A wrapper that learns from its term's rewards, before they are changed, while stepping. It
    learns nothing from rewards that are not finite."""

    per_position = False
    """Whether it keeps the moments of each position in the text apart."""

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
        """(3, bins) float64: the moments."""
        return self._moments

    def load_statistics(self, saved: Tensor | np.ndarray) -> None:
        """Goes on from what `save_statistics` returned."""
        self._moments = torch.as_tensor(saved).to(self._moments, copy=True)

    def join(self, before: np.ndarray, parts: Sequence[np.ndarray]) -> None:
        """Takes in the rewards that all processes have seen since `before`."""
        known = torch.as_tensor(before)
        found = known
        for part in parts:
            found = together(found, since(known, torch.as_tensor(part)))
        self.load_statistics(found)


class Scaled(_Learned):
    """The term's rewards divided by their running deviation: r_t / s, with s the standard deviation
    of the rewards per token as it was when the text began.

    Nothing is subtracted: a mean m taken from every token would change each return by -m times the
    length, a hidden penalty for length (or a bonus, if m < 0). s is 1 while fewer than two
    different rewards were seen. Within a text s is a positive constant that none of its tokens had
    a part in. So what the term does for the gradient is kept up to a positive factor, and its
    potential is divided by s too. The return is no longer the score.
    """

    breaks = ("preserves_return",)

    def statistics(self) -> Tensor:
        """(1,) float32: the running standard deviation."""
        scale = deviation(*self._moments)
        return torch.where(scale > 0, scale, 1.0).float()

    def change(self, rewards: Tensor, step: Tensor, own: Tensor) -> Tensor:
        """The rewards divided by the scale."""
        return rewards / own[..., 0]

    def potential(self, states: States) -> Tensor:
        """(K,): the term's potential, divided by the same scale."""
        return self.term.potential(states) / states.statistics[self.name][:, 0]


class PositionScaled(_Learned):
    """The term's rewards, normalised by position: (r_t - a (log p - m)) / (c log p + d), with p =
    (t + 1) / max_new_tokens the place of the token in the longest text.

    This is the location-aware normaliser of Yin et al. 2025 (arXiv 2501.02790). A causal reward
    model's scores drift along the text, and so do their deviations. Both lines are fitted by least
    squares to the mean and the standard deviation of the rewards seen at each position, weighted by
    how many those are. The divisor is at least a tenth of the deviation within positions. The
    paper's p needs the text's final length; with the largest length instead this is causal.

    Only the drift is taken out. m is chosen so that everything that is subtracted, in units of what
    is paid, adds up to zero over a text of the largest length. A shorter text keeps part of it, so
    this preserves neither return nor gradient; where texts differ in length, `Scaled` is the safe
    choice. Every token is paid its shift, also where the term pays at the end alone.
    """

    per_position = True

    def statistics(self) -> Tensor:
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
        # Without any spread within positions nothing is divided: c = 0 and d = 1.
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
    """Return `moments` after more values were taken in (Chan et al. 1979), without waiting for the
    device.

    Args:
        moments: (3, bins) float64: count, mean and sum of squared deviations of each bin.
        values: (K,); those that are not finite are left out.
        bins: (K,) int64, the bin of each value.
        mask: (K,) bool; values where it is False are left out.
    """

    def sums(weighted: Tensor) -> Tensor:
        return torch.zeros_like(moments[0]).index_add(0, bins, weighted)

    taken = mask & values.isfinite()
    weight, values = taken.double(), torch.where(taken, values, 0.0).double()
    new = sums(weight)
    new_mean = sums(weight * values) / new.clamp(min=1)
    new_squares = sums(weight * (values - new_mean[bins]).square())
    return together(moments, torch.stack([new, new_mean, new_squares]))


def together(moments: Tensor, others: Tensor) -> Tensor:
    """Return the moments (3, bins) of all values of which some have `moments` and the others
    `others` (Chan et al. 1979)."""
    (count, mean, squares), (new, new_mean, new_squares) = moments, others
    total = (count + new).clamp(min=1)
    shift = new_mean - mean
    return torch.stack(
        [
            count + new,
            mean + shift * new / total,
            squares + new_squares + shift.square() * count * new / total,
        ]
    )


def since(before: Tensor, now: Tensor) -> Tensor:
    """Return the moments (3, bins) of the values that were taken in between: `together(before, it)`
    is `now`."""
    (count, mean, squares), (total, all_mean, all_squares) = before, now
    new = total - count
    new_mean = torch.where(new > 0, (total * all_mean - count * mean) / new.clamp(min=1), 0.0)
    between = (new_mean - mean).square() * count * new / total.clamp(min=1)
    return torch.stack([new, new_mean, (all_squares - squares - between).clamp(min=0)])


def deviation(count: Tensor, mean: Tensor, squares: Tensor) -> Tensor:
    """Return the standard deviation from the moments, 0 where it is no more than rounding."""
    spread = (squares / count.clamp(min=1)).sqrt()
    # A spread below what float32 holds would be 0, or a division by almost nothing.
    return torch.where(
        spread > (1e-6 * mean.abs()).clamp(min=torch.finfo(torch.float32).tiny), spread, 0.0
    )


def line(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return slope and intercept of the weighted least squares of y on x, all (n,). The line is
    level where only one x has weight."""
    total = weight.sum().clamp(min=1)
    mean_x, mean_y = (weight * x).sum() / total, (weight * y).sum() / total
    spread = (weight * (x - mean_x).square()).sum()
    slope = (weight * (x - mean_x) * (y - mean_y)).sum() / spread
    slope = torch.where(spread > 1e-12, slope, 0.0)
    return slope, mean_y - slope * mean_x
