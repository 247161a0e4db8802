"""Reward designs that questions of the suite ask about, and that nobody should train on otherwise.

Grids name them by import path, as in `reward: "benchmarks.suite.rewards:Decoys"`, and are run from
the repository's root with `--modules benchmarks.suite.rewards`.
"""

import torch
from torch import Tensor

from tokenenv.models.trunks import text_states
from tokenenv.rewards.distill import Distill
from tokenenv.rewards.progressive import progressive
from tokenenv.rewards.redistribute import at_places
from tokenenv.rewards.seen import FinishedTexts, States, Transitions
from tokenenv.rewards.shaping import Shaping
from tokenenv.rewards.term import Context
from tokenenv.rewards.token import Token

FIRST_DECOY, DECOYS, DECOY_BONUS = 30, 10, 0.1
"""Words of Negation-v0 that change nothing in its score, and what each is paid too much."""
KINDNESS = 0.1
"""What the kind reward model pays each token of Reviews-v0 too much, on average."""
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
    """The sum of scores of a reward model that is too kind: r_t = q_t, the bundled model's score of
    the token and `KINDNESS` more.

    Args:
        uneven: whether tokens with an even id have twice the bonus and the others none, as where a
            model likes certain words. A threshold that knows the bonus cannot take this one away.
    """

    name = "kind"
    preserves_return = False
    preserves_gradient = False

    def __init__(self, uneven: bool = False) -> None:
        self.uneven = uneven

    def reward(self, batch: Transitions) -> Tensor:
        """(K,): q_t."""
        return self.q(batch.tokens, batch.after.of(self.models[0]))

    def q(self, tokens: Tensor, states: Tensor) -> Tensor:
        """Return the kind model's scores of tokens (n,) with the states (n, H) after them."""
        bonus = (tokens % 2 == 0) * (2 * KINDNESS) if self.uneven else KINDNESS
        return self._head(states) + bonus


class KindClip(KindSum):
    """r_t = min(q_t - floor, 0) (Gao et al. 2024, arXiv 2410.15115): only tokens that score less
    than the floor are paid for, so nothing is earned by going on."""

    def __init__(self, floor: float, uneven: bool = False) -> None:
        super().__init__(uneven)
        self.floor = floor

    def reward(self, batch: Transitions) -> Tensor:
        """(K,): what a token lacks."""
        return (super().reward(batch) - self.floor).clamp(max=0.0)


class KindMin(KindSum):
    """The return is the worst token's score, as in PURE (Cheng et al. 2025, arXiv 2504.15275):
    r_t = m_t - m_{t-1} with m_t the least q so far. PURE weighs the tokens of a finished text by a
    softmax; this is its limit, paid as soon as it is known."""

    has_memory = True

    def remember(self, memory: Tensor | None, tokens: Tensor, states: States) -> Tensor:
        """(K,): the least q so far; infinite at the prompt, which is paid nothing."""
        if memory is None:
            return torch.full((len(states.step),), torch.inf, device=states.step.device)
        return torch.minimum(memory, self.q(tokens, states.of(self.models[0])).float())

    def reward(self, batch: Transitions) -> Tensor:
        """(K,): how much worse the worst token has become."""
        now, before = (states.memory[self.name] for states in (batch.next, batch.before))
        return now - torch.where(before.isinf(), 0.0, before)


class KindGain(KindSum):
    """r_t = q_t - q_{t-1} with q_0 = 0: the return is the last token's score."""

    has_memory = True

    def remember(self, memory: Tensor | None, tokens: Tensor, states: States) -> Tensor:
        """(K,): q of the last token; 0 at the prompt."""
        q = self.q(tokens, states.of(self.models[0])).float()
        return torch.zeros_like(q) if memory is None else q

    def reward(self, batch: Transitions) -> Tensor:
        """(K,): how much better than the token before."""
        return batch.next.memory[self.name] - batch.before.memory[self.name]


class KindDelta(KindSum):
    """Delta of Gao et al. 2024 (arXiv 2410.15115): r_t = q_t - q_{t+1}, for the last token but one
    q_t, and for the last 0. What is earned from a token on is this token's own score, whatever
    follows, and the return is the first token's. It is paid when the text is finished."""

    def bind(self, context: Context) -> None:
        """Takes the scorer, and waits for the finished text."""
        super().bind(context)
        self.kind = "hindsight"

    def place(self, texts: FinishedTexts, max_new_tokens: int) -> Tensor:
        """(B, T): each token's score less the next one's."""
        states = text_states(self.models[0], texts.tokens, texts.length)
        each = self.q(texts.tokens.flatten(), states.flatten(0, 1)).view(texts.tokens.shape)
        own, q = texts.own_mask(max_new_tokens), at_places(each, texts.positions(max_new_tokens))
        paid = own & own.roll(-1, 1)  # the last token is not paid
        paid[:, -1] = False
        q = torch.where(paid, q, 0.0)
        return q - q.roll(-1, 1) * paid


KIND_CLIP, KIND_CLIP_AT_0 = KindClip(KINDNESS), KindClip(0.0)
UNEVEN_SUM, UNEVEN_CLIP, UNEVEN_MIN = KindSum(True), KindClip(KINDNESS, True), KindMin(True)
UNEVEN_GAIN, UNEVEN_DELTA = KindGain(True), KindDelta(True)
FADE_IN = progressive("terminal", "delta", tokens=PASSAGE)
FADE_OUT = progressive("delta", "terminal", tokens=PASSAGE)
FADE_IN_BIASED = progressive("terminal", Decoys(), tokens=PASSAGE)
FADE_OUT_BIASED = progressive(Decoys(), "terminal", tokens=PASSAGE)
FIRST_30, FIRST_50 = Distill(first=0.3), Distill(first=0.5)
LAST_30, LAST_50 = Distill(last=0.3), Distill(last=0.5)
