"""novelty: a bonus for each token that the text has not used before."""

import torch
from torch import Tensor

from tokenenv import FinishedTexts, RewardTerm


class Novelty(RewardTerm):
    """A bonus for each token that the text has not used before, 1 in all for a text without
    repetitions. It knows no score: mix it with one."""

    name = "novelty"
    kind = "hindsight"
    preserves_return = False
    preserves_gradient = False

    def place(self, texts: FinishedTexts, max_new_tokens: int) -> Tensor:
        """(B, T): 1 / T on each response token that is new."""
        bonus = torch.zeros(len(texts.ids), max_new_tokens)
        for row, (_, response) in enumerate(texts.prompt_and_response_ids()):
            for place, token in enumerate(response):
                bonus[row, place] = float(token not in response[:place]) / max_new_tokens
        return bonus.to(texts.tokens.device)
