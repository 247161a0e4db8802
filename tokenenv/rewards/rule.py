"""Any Python function of prompt and response as a reward: at the end, as a text is written, or for
each of its tokens."""

import functools
import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tokenenv.errors import InvalidArgument, check_choice
from tokenenv.rewards.seen import FinishedTexts, RunningTexts, States, Transitions
from tokenenv.rewards.term import Context, RewardTerm

LARGEST = torch.finfo(torch.float32).max
"""A larger number would be infinite when it is paid."""


class _RuleTerm(RewardTerm):
    """What both rules share: a callable on (prompt, response), as texts or as token ids."""

    _watched = False

    def __init__(
        self, function: Callable[[Any, Any], Any], on: Literal["text", "tokens"] = "text"
    ) -> None:
        if not callable(function) or isinstance(function, type):
            raise InvalidArgument(
                f"{type(self).__name__} takes a function of (prompt, response), not {function!r}."
            )
        check_choice("on", on, ("text", "tokens"))
        self.function = function
        self.on = on
        self.needs = frozenset({"tokenizer"} if on == "text" else ())

    def bind(self, context: Context) -> None:
        """Looks whether the numbers are paid, for then they must be finite."""
        super().bind(context)
        self._watched = context.watched

    def _pairs(self, texts: FinishedTexts | RunningTexts) -> list[tuple[Any, Any]]:
        """What the function is called with, for each of the texts."""
        if self.on == "text":
            return texts.prompt_and_response_texts()
        return texts.prompt_and_response_ids()

    def _number(self, value: Any, response: Any) -> float:
        """`value`, which the function gave for `response`, as a float; raises where it is none, or
        where it is not finite and is to be paid."""
        number = _as_float(value)
        if abs(number) <= LARGEST or (self._watched and _is_number(value)):
            return number
        raise InvalidArgument(
            f"the reward rule {_name_of(self.function)!r} returned {_short(value)} for the "
            f"response {_short(response)}; it must return a finite number."
        )


class Rule(_RuleTerm):
    """The reward that a Python function gives to a text: r_t = function(prompt, response) at the
    last token, else 0.

    `function` gets two strings (on="text", special tokens removed; joined they are the text, so a
    response may begin with a space) or two lists of token ids (on="tokens", the stop token
    included) and returns a finite number. A plain function given as `reward=` is a Rule of it.
    Causal; preserves the return and the policy gradient, being the return.

    With delta=True the same reward is paid while the text is written: r_t = function(prompt,
    response up to y_t) - function(prompt, response before y_t), which adds up to function(prompt,
    response) - function(prompt, ""). It is potential-based shaping of the rule, as `Delta` is of
    a score, and preserves what the rule preserves. The function is called once for each token of
    each text, and once where a text begins, so it should be fast. It must make sense of unfinished
    texts, cannot tell them from finished ones, and must return the same number for the same text.

    At an unscored truncation (score_truncated=False) the rule pays nothing; its dense form keeps
    what it has paid so far, as the learner's bootstrap goes on from there.

    Args:
        function: of (prompt, response).
        on: "text" or "tokens": what it is called with.
        delta: whether to pay what each token changes instead of everything at the end.
    """

    name = "rule"
    pays_score = True
    delta = False

    def __init__(
        self,
        function: Callable[[Any, Any], Any],
        on: Literal["text", "tokens"] = "text",
        *,
        delta: bool = False,
    ) -> None:
        super().__init__(function, on)
        if delta:
            self.delta = self.has_memory = self.has_potential = True
            self.pays_score = False

    def reward(self, batch: Transitions) -> Tensor:
        """(K,): the rule's number where a text ends and is scored, or what each token added."""
        if self.delta:
            return batch.after.memory[self.name] - batch.before.memory[self.name]
        if batch.finished is None:
            return torch.zeros(batch.tokens.shape, dtype=torch.float32, device=batch.tokens.device)
        return batch.at_end(self._call(batch.finished, batch.tokens.device))

    def remember(self, memory: Tensor | None, tokens: Tensor, states: States) -> Tensor:
        """(K,): the rule's number for the text so far, so that each is asked for once."""
        assert states.texts is not None
        return self._call(states.texts, tokens.device)

    def potential(self, states: States) -> Tensor:
        """(K,): the rule's number for the text so far."""
        return states.memory[self.name]

    def _call(self, texts: FinishedTexts | RunningTexts, device: torch.device) -> Tensor:
        """One float32 number for each text."""
        numbers = [
            self._number(self.function(prompt, response), response)
            for prompt, response in self._pairs(texts)
        ]
        return torch.tensor(numbers, dtype=torch.float32).to(device, non_blocking=True)


class TokenRule(_RuleTerm):
    """The rewards that a Python function gives to the tokens of a finished text: r_t =
    function(prompt, response)[t].

    The function gets what that of a `Rule` gets, and returns one finite number for every response
    token, the stop token included. Hindsight: their sum is paid at the end and each number stands
    on its token in `token_rewards`. It defines its own return.
    """

    name = "token_rule"
    kind = "hindsight"
    pays_score = True

    def place(self, texts: FinishedTexts, max_new_tokens: int) -> Tensor:
        """(B, T): the rule's numbers, right-padded with zeros."""
        out = torch.zeros(len(texts.ids), max_new_tokens, dtype=torch.float32)
        counts = texts.length - texts.prompt_length
        for row, (pair, count) in enumerate(zip(self._pairs(texts), counts, strict=True)):
            out[row, :count] = self._one_each(self.function(*pair), pair[1], int(count))
        return out.to(texts.tokens.device, non_blocking=True)

    def _one_each(self, numbers: Sequence[Any], response: Any, count: int) -> Tensor:
        if not hasattr(numbers, "__len__") or len(numbers) != count:
            given = f"{len(numbers)} numbers" if hasattr(numbers, "__len__") else _short(numbers)
            raise InvalidArgument(
                f"the token rule {_name_of(self.function)!r} returned {given} for the response "
                f"{_short(response)}; it must return {count}, one for each token."
            )
        return torch.tensor([self._number(number, response) for number in numbers])


def _plain(value: Any) -> Any:
    """NumPy's numbers, and arrays and tensors of one number, as Python's number."""
    one = isinstance(value, np.generic | np.ndarray | Tensor) and len(value.reshape(-1)) == 1
    return value.item() if one else value


def _is_number(value: Any) -> bool:
    """Whether it is a number of any kind, finite or not; True is, a string that spells one is
    not."""
    return isinstance(_plain(value), Real)


def _as_float(value: Any) -> float:
    """A number of any kind as a float, NaN for anything else."""
    # A string that spells a number is a mistake, which float() would let pass.
    value = _plain(value)
    try:
        return float(value) if isinstance(value, Real) else math.nan
    except OverflowError:  # a whole number of hundreds of digits
        return math.inf if value > 0 else -math.inf


def _name_of(function: Any) -> str:
    """What a user calls the function."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def _short(value: Any) -> str:
    """At most 80 characters of its repr."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
