"""Potential-based shaping: dense rewards that change neither the return nor its gradient."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenenv.errors import InvalidArgument
from tokenenv.models.prefix_scores import is_scorer
from tokenenv.rewards.seen import States, Transitions
from tokenenv.rewards.term import Context, RewardTerm

Potential = Callable[[States], Tensor]
"""Phi (K,) float32 of K texts so far."""


class Shaping(RewardTerm):
    """The score at the end, shaped by any potential Phi (Ng, Harada and Russell 1999): r_t = [score
    if the text ends here] + gamma Phi(s_{t+1}) - Phi(s_t).

    Phi is zero exactly where learners do not bootstrap (termination, scored truncation). It is kept
    at an unscored truncation, where the text is not paid its score. Undiscounted, the rewards add
    up to score - Phi(prompt): the return is preserved up to a constant of the prompt, and with it
    the policy gradient. A potential that changes while a text runs, or rewards that are clipped or
    shifted afterwards, break both.

    Where the environment writes into texts, s_{t+1} is the state in which the policy acts next. A
    turn's last token is then also paid what the reply changed in Phi: without it the rewards would
    not add up. It is no merit of the token's, and adds variance where the reply is left to chance.

    The design equals a critic shifted by Phi, for every lambda (Wiewiora 2003); docs/rewards.md
    says how to compare with that.

    Args:
        potential: Phi (K,) of the states of K texts; None takes the score of the text so far.
        gamma: the learner's discount per token, 0 to 1.
        models: causal models whose states the potential reads with `states.of(model)`.
    """

    name = "shaping"
    needs = frozenset({"scorer"})
    preserves_return = True
    preserves_gradient = True
    has_potential = True

    def __init__(
        self, potential: Potential | None = None, *, gamma: float = 1.0, models: Sequence[Any] = ()
    ) -> None:
        if not 0.0 <= gamma <= 1.0:
            raise InvalidArgument(f"gamma={gamma} is not allowed; it must lie between 0 and 1.")
        self.gamma = gamma
        self.models = tuple(models)
        self._given = potential
        self.preserves_return = gamma == 1.0
        if potential is None:
            self.needs = frozenset({"causal scorer"})

    def reward(self, batch: Transitions) -> Tensor:
        """(K,): what the token added to the potential, and the score where a text ends and is
        scored."""
        following = torch.where(batch.scored, 0.0, self.potential(batch.next))
        return batch.final_score() + self.gamma * following - self.potential(batch.before)

    def potential(self, states: States) -> Tensor:
        """(K,): Phi of the text so far."""
        if self._given is not None:
            return self._given(states)
        assert states.score is not None
        return states.score


class Delta(Shaping):
    """What each token changes in the score of the text so far, f (R3HF, Li et al. 2024, arXiv
    2411.08302): r_t = f(x, y_<=t) - f(x, y_<t).

    The rewards add up to score - f(prompt). The design is `Shaping` with Phi = f, undiscounted, and
    preserves what that preserves. What the environment writes behind a token belongs to its
    difference (`Shaping` says why). A reward model that was trained on whole texts only scores
    prefixes badly; that costs variance, never bias.
    """

    name = "delta"

    def __init__(self) -> None:
        super().__init__()

    def reward(self, batch: Transitions) -> Tensor:
        """(K,): what the token, and what was written behind it, added to the score."""
        # The formula of `Shaping`, without the score that it adds and subtracts where a text ends.
        assert batch.next.score is not None
        assert batch.before.score is not None
        return batch.next.score - batch.before.score


class Oracle(Shaping):
    """Shaping with the best potential there is: r_t = V*(s_{t+1}) - V*(s_t), with V* the
    soft-optimal value, which after the last token is the score.

    At the optimum r_t equals beta log pi*/pi_ref token by token, so that every token is paid its
    own advantage (Rafailov et al. 2024, arXiv 2404.12358). It is for tasks whose optimum is known,
    as the ceiling that learned dense rewards can be measured against. Preserves the return up to
    V*(prompt), and the gradient. A token that the environment answers is also paid how much better
    the answer was than the expected one, which is 0 on average.

    Args:
        beta: the coefficient of the KL in the objective score - beta KL whose value V* is, reward
            per nat, 0 or more. None takes the env's when it is made, which is 0 under kl="none".
    """

    name = "oracle"
    needs = frozenset({"oracle"})

    def __init__(self, beta: float | None = None) -> None:
        super().__init__()
        self.needs = type(self).needs
        self.beta = beta

    def bind(self, context: Context) -> None:
        """Takes the task's oracle, and beta where none was given."""
        super().bind(context)
        assert context.task.oracle is not None
        self._oracle = context.task.oracle
        self._replaced = is_scorer(context.task.gold)
        self._beta = context.kl_coef if self.beta is None else self.beta

    def reward(self, batch: Transitions) -> Tensor:
        """(K,): what the token, and what was written behind it, added to V*."""
        if not self._replaced:
            return super().reward(batch)
        # The score is another one, and V* of a finished text is the true one.
        return self.potential(batch.next) - self.potential(batch.before)

    def potential(self, states: States) -> Tensor:
        """(K,): V* of the text so far."""
        # Each state is asked about as what follows a token, as what comes before the next, and for
        # the infos; the tables do not change.
        if self not in states.known:
            states.known[self] = self._oracle.state_value(states.hidden, states.step, self._beta)
        return states.known[self]
