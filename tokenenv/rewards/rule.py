"""Any Python callable as a reward."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tokenenv.errors import InvalidArgument
from tokenenv.rewards.term import FinishedTexts, RewardTerm, Transitions


class _RuleTerm(RewardTerm):
    """What both rules share: a callable on (prompt, response), as texts or as token ids."""

    def __init__(
        self, function: Callable[[Any, Any], Any], on: Literal["text", "tokens"] = "text"
    ) -> None:
        if on not in ("text", "tokens"):
            raise InvalidArgument(f"on={on!r} is not known; allowed: 'text', 'tokens'.")
        self.function = function
        self.on = on
        self.needs = frozenset({"tokenizer"} if on == "text" else ())

    def _call(self, texts: FinishedTexts) -> list[Any]:
        pairs = (
            texts.prompt_and_response_texts()
            if self.on == "text"
            else texts.prompt_and_response_ids()
        )
        return [self.function(prompt, response) for prompt, response in pairs]


class Rule(_RuleTerm):
    """r_t = function(prompt, response) at the last token, else 0.

    `function` gets two strings (on="text", special tokens removed; joined they are the text, so a
    response may begin with a space) or two lists of token ids (on="tokens", the stop token
    included) and returns a finite number. Causal; preserves the return and the policy gradient,
    being the return.
    """

    name = "rule"
    pays_score = True

    def reward(self, batch: Transitions) -> Tensor:
        """(K,): the rule's number where a text ends and is scored."""
        if batch.finished is None:
            return torch.zeros(batch.tokens.shape, dtype=torch.float32, device=batch.tokens.device)
        numbers = torch.tensor(
            [_finite(number) for number in self._call(batch.finished)], dtype=torch.float32
        )
        return batch.at_end(numbers.to(batch.tokens.device, non_blocking=True))


class TokenRule(_RuleTerm):
    """r_t = function(prompt, response)[t]: one number for every response token, known when the text
    is finished.

    Hindsight: its sum is paid at the end and each number stands on its token in `token_rewards`. It
    defines its own return.
    """

    name = "token_rule"
    kind = "hindsight"
    pays_score = True

    def place(self, texts: FinishedTexts, max_new_tokens: int) -> Tensor:
        """(B, T): the rule's numbers, right-padded with zeros."""
        out = torch.zeros(len(texts.ids), max_new_tokens, dtype=torch.float32)
        counts = texts.length - texts.prompt_length
        for row, (numbers, count) in enumerate(zip(self._call(texts), counts, strict=True)):
            out[row, :count] = _one_each(numbers, int(count))
        return out.to(texts.tokens.device, non_blocking=True)


def _finite(number: Any) -> float:
    value = float(number)
    if not np.isfinite(value):
        raise InvalidArgument(f"a reward rule returned {value}; it must return a finite number.")
    return value


def _one_each(numbers: Sequence[Any], count: int) -> Tensor:
    if len(numbers) != count:
        raise InvalidArgument(
            f"a token rule returned {len(numbers)} numbers for {count} response tokens."
        )
    return torch.tensor([_finite(number) for number in numbers], dtype=torch.float32)
