"""The score, shared out evenly: the control that every redistribution must beat."""

from torch import Tensor

from tokenenv.rewards.redistribute import Redistribution
from tokenenv.rewards.seen import FinishedTexts


class Uniform(Redistribution):
    """The score, shared out evenly: r_t = score / T for each of the T own tokens.

    Hindsight: preserves the return, not the gradient of reward-to-go (early shares depend on tokens
    not yet chosen).
    """

    name = "uniform"

    def place(self, texts: FinishedTexts, max_new_tokens: int) -> Tensor:
        """(B, T): equal shares on the own tokens."""
        assert texts.score is not None
        own = texts.own_mask(max_new_tokens).float()
        return own * (texts.score / own.sum(1).clamp(min=1))[:, None]
