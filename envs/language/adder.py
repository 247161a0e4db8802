"""Sums as tokens, one for each character, and an `Adder` that says whether they are right: as a
text, and up to each digit."""

from functools import cache

import torch
from torch import Tensor

from tokenenv.envs.language.digits import ZERO, DigitMachine
from tokenenv.envs.language.splits import SPLITS, split_of
from tokenenv.errors import check_choice

PLUS, EQUALS = 12, 13
TOKENS = ["<pad>", "<eos>", *"0123456789", "+", "="]
"""The token with id i is the i-th of this list."""
MAX_OPERAND = 99
LARGEST = 10**9
"""The bound of operands, for prompts that are no sums from 0 to 99: an endless number would
overflow."""


@cache
def sums(split: str) -> tuple[tuple[int, int], ...]:
    """Return the pairs of operands of one split, "train" or "test", both 0 to 99, in order. a + b
    and b + a are in the same split."""
    check_choice("split", split, SPLITS)
    pairs = ((a, b) for a in range(MAX_OPERAND + 1) for b in range(MAX_OPERAND + 1))
    return tuple((a, b) for a, b in pairs if split_of(f"{min(a, b)}+{max(a, b)}=") == split)


class Adder(DigitMachine):
    """A machine that reads a question such as "27+85=" and then the answer, token by token. It is
    a `TokenModel`, the trunk of a scorer.

    States are (K, 4) int64: the sum so far, the operand being read, the place in the answer (-1
    within the question), and whether the answer is right up to there (1 or 0). A right answer is
    the digits of the sum from the first on, and then <eos>. Any tokens can be read: the question
    ends at the first "=", tokens in it that are no digit or sign are skipped, and an operand
    without digits is 0.
    """

    vocab_size = len(TOKENS)
    start = (0, 0, -1, 1)

    def after(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Return the states (K, 4) after one more token (K,) each."""
        tokens = tokens.to(self.device, non_blocking=True)
        total, operand, place, right = states.unbind(-1)
        # Both continuations are computed for all rows, and `asking` chooses: no row may decide what
        # the device runs.
        asking = place < 0
        digit, closes = tokens - ZERO, (tokens == PLUS) | (tokens == EQUALS)
        longer = torch.where((digit >= 0) & (digit < 10), operand * 10 + digit, operand) % LARGEST
        question = [
            torch.where(closes, total + operand, total),
            torch.where(closes, 0, longer),
            torch.where(tokens == EQUALS, 0, -1),
            right,
        ]
        answer = [total, operand, place + 1, right * (tokens == self._expected(total, place))]
        columns = zip(question, answer, strict=True)
        return torch.stack([torch.where(asking, one, other) for one, other in columns], dim=-1)

    def score(self, states: Tensor) -> Tensor:
        """Return 1 where the text is a question with its whole right answer, <eos> included, else
        0; (K,) float32."""
        total, _, place, right = states.unbind(-1)
        return ((place == self._num_digits(total) + 1) & (right == 1)).float()

    def step_score(self, states: Tensor) -> Tensor:
        """Return 1 where the answer is right up to here, else 0; (K,) float32."""
        return states[:, 3].float()
