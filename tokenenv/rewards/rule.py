"""Any Python function of prompt and response as a reward: at the end, as a text is written, or for
each of its tokens."""

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tokenenv.errors import InvalidArgument, check_choice
from tokenenv.rewards.function import keywords_of, name_of, parameters_of
from tokenenv.rewards.seen import FinishedTexts, RunningTexts, States, Transitions
from tokenenv.rewards.term import Context, RewardTerm
from tokenenv.tables import by_name

LARGEST = torch.finfo(torch.float32).max
"""A larger number would be infinite when it is paid."""


class _RuleTerm(RewardTerm):
    """What both rules share: a function of prompt and response, as texts or as token ids, and of
    what it asks for by name."""

    def __init__(
        self,
        function: Callable[..., Any],
        on: Literal["text", "tokens"] = "text",
        *,
        batched: bool = False,
    ) -> None:
        if not callable(function) or isinstance(function, type):
            raise InvalidArgument(
                f"{type(self).__name__} takes a function of (prompt, response), not {function!r}."
            )
        check_choice("on", on, ("text", "tokens"))
        self.function, self.on, self.batched = function, on, batched
        self._parameters = parameters_of(function)
        self.columns = self._parameters.columns
        reads_text = on == "text" or self._parameters.messages
        self.needs = frozenset({"tokenizer"} if reads_text else ())
        self._watched, self._scored_by_rules, self._chats = False, False, None

    def bind(self, context: Context) -> None:
        """Looks whether the columns that the function asks for are there, and whether the numbers
        are paid, for then they must be finite."""
        super().bind(context)
        self._watched, self._chats = context.watched, context.spec.chats
        # Where the task has no scorer, a sequence score is that of the only rule that is paid.
        self._scored_by_rules = context.scorer is None and not context.watched
        misplaced = set(self._parameters.first) - {"prompt", "response"}
        columns = set(context.task.columns[0] if context.task.columns else ())
        if self._parameters.turns and "turns" in columns:
            raise InvalidArgument(
                f"the function {name_of(self.function)!r} asks for turns, the segments of the "
                "response, and the prompts have a column of that name too; rename the column."
            )
        for name in misplaced & columns:
            raise InvalidArgument(
                f"the function {name_of(self.function)!r} has its parameter {name!r} where the "
                "prompt and the response are given; put the column's name behind these two."
            )

    def _answers(self, texts: FinishedTexts | RunningTexts) -> list[tuple[Any, Any]]:
        """What the function returned for each of the texts, and the response."""
        if self.on == "text":
            pairs: Sequence[tuple[Any, Any]] = texts.prompt_and_response_texts()
        else:
            pairs = texts.prompt_and_response_ids()
        keywords = keywords_of(self._parameters, texts, self._chats)
        responses = [response for _, response in pairs]
        if not self.batched:
            each = zip(pairs, keywords, strict=True)
            values = [self.function(*pair, **named) for pair, named in each]
        else:
            prompts = [prompt for prompt, _ in pairs]
            # None stands in a list where a text's row has no such column.
            values = self.function(prompts, responses, **by_name(keywords, None))
            self._check_count(values, len(pairs), f"{len(pairs)} texts", "text")
        return list(zip(values, responses, strict=True))

    def _number(self, value: Any, response: Any) -> float:
        """`value`, which the function gave for `response`, as a float; raises where it is none, or
        where it is not finite and is to be paid."""
        number = _as_float(value)
        if abs(number) <= LARGEST or (self._watched and _is_number(value)):
            return number
        raise InvalidArgument(
            f"the rule {name_of(self.function)!r} returned {_short(value)} for the response "
            f"{_short(response)}; it must return a finite number."
        )

    def _check_count(self, values: Any, count: int, given: str, each: str) -> None:
        """Raises unless `values` are a list of so many, one for each `each` of what was given."""
        listed = hasattr(values, "__len__") and hasattr(values, "__getitem__")
        if not listed or isinstance(values, str | Mapping) or getattr(values, "ndim", 1) == 0:
            found = _short(values)
        elif len(values) == count:
            return
        else:
            found = f"{len(values)} numbers"
        raise InvalidArgument(
            f"the rule {name_of(self.function)!r} returned {found} for {given}; it must return "
            f"{count}, one for each {each}."
        )


class Rule(_RuleTerm):
    """The reward that a Python function gives to a text: r_t = function(prompt, response) at the
    last token, else 0.

    `function` gets two strings (on="text", special tokens removed; joined they are the text, so a
    response may begin with a space) or two lists of token ids (on="tokens", the stop token
    included) and returns a finite number. A plain function given as `reward=` is a Rule of it.
    Causal; preserves the return and the policy gradient, being the return.

    Further parameters are filled by name: `messages` is the conversation (a list of {"role",
    "content"}; without a chat template one message of the user's), `turns` is the response in
    segments (a list of {"own", "text"}, whose texts joined are the response; "own" is False where
    the environment wrote; "tokens" in the place of "text" where tokens have no text), any other
    name is the column of the prompt's row that is called so (`def right(prompt, response,
    answer)`), and `**row` takes all columns. A parameter with a default keeps it where there is no
    such column. `response` is the whole response, whoever wrote it.

    With dense=True the same reward is paid while the text is written: r_t = function(prompt,
    response up to y_t, and what the environment writes behind it) - function(prompt, response
    before y_t), which adds up to function(prompt, response) - function(prompt, ""). It is
    potential-based shaping of the rule, as `Delta` is of a score, and preserves what the rule
    preserves. The function is called once for each token of each text, whoever wrote it, and once
    where a text begins, so it should be fast. It must make sense of unfinished texts, cannot tell
    them from finished ones, and must return the same number for the same text.

    At an unscored truncation (score_truncated=False) the rule pays nothing; its dense form keeps
    what it has paid so far, as the learner's bootstrap goes on from there.

    Where the task has no scorer and this is the only term of the reward (beside kl and
    missing_eos), its number of the whole text is the sequence score.

    Args:
        function: of (prompt, response), and of what it asks for by name.
        on: "text" or "tokens": what it is called with.
        dense: whether to pay what each token changes instead of everything at the end.
        batched: whether the function takes many texts at once: a list in the place of each value,
            and a list of numbers back.
    """

    name = "rule"
    pays_score = True
    dense = False

    def __init__(
        self,
        function: Callable[..., Any],
        on: Literal["text", "tokens"] = "text",
        *,
        dense: bool = False,
        batched: bool = False,
    ) -> None:
        super().__init__(function, on, batched=batched)
        if dense:
            self.dense = self.has_memory = self.has_potential = True
            self.pays_score = False

    def reward(self, batch: Transitions) -> Tensor:
        """(K,): the rule's number where a text ends and is scored, or what each token added."""
        if self.dense:
            return batch.next.memory[self.name] - batch.before.memory[self.name]
        if batch.finished is None:
            return torch.zeros(batch.tokens.shape, dtype=torch.float32, device=batch.tokens.device)
        if self._scored_by_rules and batch.finished.score is not None:
            # The env has asked this rule for the sequence score: a function is called once a text.
            return batch.at_end(batch.finished.score)
        return batch.at_end(self.numbers(batch.finished, batch.tokens.device))

    def remember(self, memory: Tensor | None, tokens: Tensor, states: States) -> Tensor:
        """(K,): the rule's number for the text so far, so that each is asked for once."""
        assert states.texts is not None
        return self.numbers(states.texts, tokens.device)

    def potential(self, states: States) -> Tensor:
        """(K,): the rule's number for the text so far."""
        return states.memory[self.name]

    def numbers(self, texts: FinishedTexts | RunningTexts, device: torch.device) -> Tensor:
        """One float32 number for each text."""
        numbers = [self._number(*answer) for answer in self._answers(texts)]
        return torch.tensor(numbers, dtype=torch.float32).to(device, non_blocking=True)


class TokenRule(_RuleTerm):
    """The rewards that a Python function gives to the tokens of a finished text: r_t =
    function(prompt, response)[t].

    The function gets what that of a `Rule` gets, and returns one finite number for every response
    token, whoever wrote it, the stop token included; with batched=True, a list of such numbers for
    each text. Numbers of tokens that are not own (a prefix's, and those that the environment wrote)
    are left out. Hindsight: the sum of the others is paid at the end, and each number stands on its
    token in `token_rewards`.
    It defines its own return.
    """

    name = "token_rule"
    kind = "hindsight"
    pays_score = True

    def place(self, texts: FinishedTexts, max_new_tokens: int) -> Tensor:
        """(B, T): the rule's numbers of the policy's tokens, right-padded with zeros."""
        out = torch.zeros(len(texts.ids), max_new_tokens, dtype=torch.float32)
        counts, steps = texts.length - texts.prompt_length, texts.steps()
        places = texts.positions(max_new_tokens) - texts.prompt_length[:, None]
        for row, (answer, count) in enumerate(zip(self._answers(texts), counts, strict=True)):
            numbers = self._one_each(*answer, int(count))
            out[row, : steps[row]] = numbers[torch.from_numpy(places[row, : steps[row]])]
        return out.to(texts.tokens.device, non_blocking=True)

    def _one_each(self, numbers: Any, response: Any, count: int) -> Tensor:
        self._check_count(numbers, count, f"the response {_short(response)}", "token")
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


def _short(value: Any) -> str:
    """At most 80 characters of its repr."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
