"""Reward designs that questions of the suite ask about, and that nobody should train on otherwise.

Grids name them by import path, as in `reward: "benchmarks.suite.rewards:Decoys"`, and are run from
the repository's root with `--modules benchmarks.suite.rewards`.
"""

import torch
from torch import Tensor

from tokenenv.rewards.distill import Distill
from tokenenv.rewards.progressive import progressive
from tokenenv.rewards.seen import States, Transitions
from tokenenv.rewards.shaping import Shaping
from tokenenv.rewards.token import Token

FIRST_DECOY, DECOYS, DECOY_BONUS = 30, 10, 0.1
"""Words of Negation-v0 that change nothing in its score, and what each is paid too much."""
KINDNESS = 0.1
"""What the kind reward model pays each token of Reviews-v0 too much."""
PASSAGE = 15_000
"""Tokens over which one design fades into another: the first half of a run of 30,000."""


class Decoys(Shaping):
    """`delta`, and a bonus for words that change nothing: a reward model with a bias."""

    name = "decoys"
    preserves_return = False
    preserves_gradient = False
    has_potential = False

    def reward(self, batch: Transitions) -> Tensor:
        """(K,): what the token changed in the score, and the bonus of a decoy."""
        is_decoy = (batch.tokens >= FIRST_DECOY) & (batch.tokens < FIRST_DECOY + DECOYS)
        return super().reward(batch) + DECOY_BONUS * is_decoy


class KindSum(Token):
    """The reward model's score of each token, and `KINDNESS` more: r_t = q_t."""

    name = "kind"
    preserves_return = False
    preserves_gradient = False

    def reward(self, batch: Transitions) -> Tensor:
        """(K,): q_t."""
        return self.kind_score(batch.after)

    def kind_score(self, states: States) -> Tensor:
        """(K,): q, the kind reward model's score of the last token."""
        return self._head(states.of(self.models[0])) + KINDNESS


class KindDelta(KindSum):
    """r_t = q_t - q_{t-1}, with q_0 that of the prompt (Gao et al. 2024, arXiv 2410.15115)."""

    def reward(self, batch: Transitions) -> Tensor:
        """(K,): the difference of two tokens' scores."""
        return self.kind_score(batch.after) - self.kind_score(batch.before)


class KindClip(KindSum):
    """r_t = min(q_t - `KINDNESS`, 0) (the same source): only tokens that the true model dislikes
    are paid for, so nothing is earned by going on."""

    def reward(self, batch: Transitions) -> Tensor:
        """(K,): what a token lacks."""
        return (self.kind_score(batch.after) - KINDNESS).clamp(max=0.0)


class KindMin(KindSum):
    """The return is the worst token's score, as in PURE (Cheng et al. 2025, arXiv 2504.15275):
    r_t = m_t - m_{t-1} with m_t the least q so far. PURE weighs the tokens of a finished text by a
    softmax; this is its limit, paid as soon as it is known."""

    has_memory = True

    def remember(self, memory: Tensor | None, tokens: Tensor, states: States) -> Tensor:
        """(K,): the least q so far; infinite at the prompt, which is paid nothing."""
        q = self.kind_score(states).float()
        return torch.full_like(q, torch.inf) if memory is None else torch.minimum(memory, q)

    def reward(self, batch: Transitions) -> Tensor:
        """(K,): how much worse the worst token has become."""
        now, before = (states.memory[self.name] for states in (batch.next, batch.before))
        return now - torch.where(before.isinf(), 0.0, before)


FADE_IN = progressive("terminal", "delta", tokens=PASSAGE)
FADE_OUT = progressive("delta", "terminal", tokens=PASSAGE)
FADE_IN_BIASED = progressive("terminal", Decoys(), tokens=PASSAGE)
FADE_OUT_BIASED = progressive(Decoys(), "terminal", tokens=PASSAGE)
FIRST_30, FIRST_50 = Distill(first=0.3), Distill(first=0.5)
LAST_30, LAST_50 = Distill(last=0.3), Distill(last=0.5)
