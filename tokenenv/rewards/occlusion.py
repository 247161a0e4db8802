"""The score, shared out by what it loses when a token is left out."""

import numpy as np
import torch
from torch import Tensor

from tokenenv.models.batching import upload
from tokenenv.rewards.redistribute import Redistribution, distinct_scores, rest_on_last
from tokenenv.rewards.seen import FinishedTexts


class Occlusion(Redistribution):
    """Leave-one-out credit (Li et al. 2016, arXiv 1612.08220): r_t = score - score of the text
    without y_t.

    The token is deleted and the text closed up; what the environment wrote always stays. The last
    own token is also paid what the sum of all r_t lacks to the score. Where each token adds a
    number of its own whatever surrounds it, r_t is that number.

    Hindsight: preserves the return, not the gradient of reward-to-go (early shares depend on tokens
    not yet chosen). Costs T scores of whole texts a text, so T forwards of a token for each of its
    tokens; equal texts are scored once. It fails where two tokens say the same thing (leaving out
    either costs nothing, and the last token gets it all), and where the scorer has never seen
    broken text.
    """

    name = "occlusion"

    def place(self, texts: FinishedTexts, max_new_tokens: int) -> Tensor:
        """(B, T): what each own token adds to the others."""
        assert texts.score is not None
        device = texts.score.device
        pairs, own = texts.prompt_and_response_ids(), texts.own_responses()
        rows, columns = np.nonzero(texts.own_columns(max_new_tokens))
        places = texts.positions(max_new_tokens)[rows, columns] - texts.prompt_length[rows]
        without = [
            (pairs[row][0], pairs[row][1][:t] + pairs[row][1][t + 1 :])
            for row, t in zip(rows, places, strict=True)
        ]
        left = None
        if own is not None:
            left = [np.delete(own[row], t) for row, t in zip(rows, places, strict=True)]
        scores = distinct_scores(self._scorer, without, self._max_batch_tokens, left)
        row, column = upload(rows, device), upload(columns, device)
        loss = texts.score[row] - scores.to(device)
        placed = torch.zeros(
            len(pairs), max_new_tokens, dtype=torch.float32, device=device
        ).index_put((row, column), loss)
        return rest_on_last(placed, texts)
