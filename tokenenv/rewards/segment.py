"""The score of the text so far, read only where a segment ends."""

import torch
from torch import Tensor

from tokenenv.errors import InvalidArgument
from tokenenv.models.heads import in_chunks
from tokenenv.models.trunks import logits_head
from tokenenv.rewards.seen import States
from tokenenv.rewards.shaping import Shaping
from tokenenv.rewards.term import Context


class Segment(Shaping):
    """The change of the score from segment to segment: r_t = f_k - f_{k-1} at the last token of
    segment k, else 0, with f_k the score of the text up to there and f_0 that of the prompt.

    A segment ends at y_t where the reference does not know how to go on, H(pi_ref(. | s_{t+1})) >=
    threshold in nats, and where a scored text ends (Yin et al. 2025, arXiv 2501.02790). The design
    is `Shaping` with Phi = the score at the end of the last segment. It adds up to score -
    f(prompt) and preserves what `Shaping` preserves. An unscored truncation ends no segment and
    keeps Phi. Where a segment ends within what the environment writes, its change is paid on the
    token before that.

    The paper pays something else: the scores of a model trained on segments, not their differences,
    each normalised by the segment's position and spread evenly over its tokens. That preserves
    neither return nor gradient; `PositionScaled` offers the normaliser.

    Args:
        threshold: in nats, 0 or more. 0 ends a segment after every token, which is `Delta`; inf
            only where texts end, which is `Terminal` less f(prompt). The entropy of a uniform
            choice among n tokens is log n.
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
        """(K,): the score at the end of the last segment, or of the prompt where a text begins."""
        assert states.score is not None
        if memory is None:
            return states.score
        entropy = in_chunks(self._entropy, states.of(self.models[0]))
        return torch.where(entropy >= self.threshold, states.score, memory)

    def potential(self, states: States) -> Tensor:
        """(K,): the score at the end of the last segment."""
        return states.memory[self.name]

    def _entropy(self, states: Tensor) -> Tensor:
        """(K,) nats, of the reference's next token."""
        # The entropy of a certain token may come out as -1e-7; a threshold of 0 must cut there too.
        return torch.special.entr(self._head(states).softmax(-1)).sum(-1).clamp(min=0.0)
