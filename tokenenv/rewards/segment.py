"""The score of the text so far, read only where a segment ends."""

import torch
from torch import Tensor

from tokenenv.errors import InvalidArgument
from tokenenv.models.heads import in_chunks
from tokenenv.models.trunks import logits_head
from tokenenv.rewards.shaping import Shaping
from tokenenv.rewards.term import Context, States


class Segment(Shaping):
    """r_t = f_k - f_{k-1} at the last token of segment k, else 0, with f_k the score of the text up
    to there and f_0 that of the prompt.

    A segment ends at y_t where the reference does not know how to go on, H(pi_ref(. | s_{t+1})) >=
    threshold in nats, and where a scored text ends (Yin et al. 2025, arXiv 2501.02790). It is
    `Shaping` with Phi = the score at the last cut, sums to score - f(prompt), and preserves what
    that preserves. An unscored truncation cuts nothing and keeps Phi. The paper pays something
    else: the scores of a model trained on segments, not their differences, each normalised by the
    segment's position and spread evenly over its tokens, which preserves neither return nor
    gradient; `PositionScaled` offers its normaliser.

    Args:
        threshold: nats, 0 or more. 0 cuts after every token, which is `Delta`; inf only where texts
            end, which is `Terminal` less f(prompt). The entropy of a uniform choice among n tokens
            is log n.
    """

    name = "segment"
    needs = frozenset({"causal scorer", "reference"})
    has_memory = True

    def __init__(self, threshold: float = 1.75) -> None:
        if not threshold >= 0:
            raise InvalidArgument(
                f"threshold={threshold} is not allowed; it must be 0 or more (nats)."
            )
        super().__init__()
        self.needs = type(self).needs
        self.threshold = threshold

    def bind(self, context: Context) -> None:
        """Takes the reference and its output layer."""
        super().bind(context)
        self.models = (context.reference,)
        self._head = logits_head(context.reference, context.spec.vocab_size)

    def remember(self, memory: Tensor | None, tokens: Tensor, states: States) -> Tensor:
        """(K,): the score at the last cut; where a text begins, that of its prompt."""
        assert states.score is not None
        if memory is None:
            return states.score
        entropy = in_chunks(self._entropy, states.of(self.models[0]))
        return torch.where(entropy >= self.threshold, states.score, memory)

    def potential(self, states: States) -> Tensor:
        """(K,): the score at the last cut."""
        return states.memory[self.name]

    def _entropy(self, states: Tensor) -> Tensor:
        """(K,) nats, of the reference's next token."""
        # A certain token's entropy may come out as -1e-7; threshold 0 has to cut there too.
        return torch.special.entr(self._head(states).softmax(-1)).sum(-1).clamp(min=0.0)
