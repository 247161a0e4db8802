"""Questions for a calculator as tokens, one for each character: what it answers to a call, which
questions there are, and a `Grader` that says whether answers are right, and how far."""

import math
import random
import re
from functools import cache

import torch
from torch import Tensor

from tokenenv.envs.language.digits import ZERO, DigitMachine
from tokenenv.envs.language.splits import SPLITS, split_of
from tokenenv.errors import check_choice

PLUS, TIMES, EQUALS, OPEN, CLOSE, RESULT, RESULT_END, ERROR = range(12, 20)
TOKENS = ["<pad>", "<eos>", *"0123456789", *"+*=[]{}?"]
"""The token with id i is the i-th of this list. "[37*46]" is a call, "{1702}" what is written
behind it, and "?" what is written behind a call that makes no sense."""
KINDS = {"sum": 0.25, "product": 0.375, "long sum": 0.375}
"""The kinds of questions, and the share of each."""
NUM_QUESTIONS = 12_000
"""How many questions there are, of both splits together."""
LARGEST = 10**12
"""The calculator knows smaller results only, and a `Grader` computes modulo this number."""
LARGEST_OPERAND = 10**6
"""The bound of operands of a `Grader`, for prompts that are no question: their product with a
number below `LARGEST` does not overflow."""
_EXPRESSION = re.compile(r"[0-9]+([+*][0-9]+)*")


def value_of(expression: str) -> int | None:
    """Return the value of sums of products of whole numbers, such as "12+3*45"; None where the
    text is no such expression, or its value is not below `LARGEST`."""
    # The length is bounded because Python refuses to read a number of thousands of digits.
    if len(expression) > 256 or not _EXPRESSION.fullmatch(expression):
        return None
    terms = (math.prod(map(int, term.split("*"))) for term in expression.split("+"))
    value = sum(terms)
    return value if value < LARGEST else None


def called(turn: str) -> int | None:
    """Return what a turn that ends with "]" asks the calculator for: the value of what stands
    between its last "[" and its end; None where that is no expression."""
    _, opened, expression = turn.removesuffix("]").rpartition("[")
    return value_of(expression) if opened else None


def written_behind(turn: str) -> str:
    """Return what the calculator writes behind a turn that ends with "]". It is never longer than
    the turn."""
    value = called(turn)
    return "?" if value is None else f"{{{value}}}"


def draw_question(kind: str, rng: random.Random) -> str:
    """Draw a question of one of `KINDS`: a sum of a number up to 99 and one up to 9, a product of a
    number from 10 to 999 and one from 10 to 99, or a sum of three numbers from 10 to 99."""
    if kind == "sum":
        return f"{rng.randint(0, 99)}+{rng.randint(0, 9)}="
    if kind == "product":
        return f"{rng.randint(10, 999)}*{rng.randint(10, 99)}="
    return f"{rng.randint(10, 99)}+{rng.randint(10, 99)}+{rng.randint(10, 99)}="


def draw_questions(split: str, count: int, rng: random.Random) -> list[str]:
    """Draw questions, and return those of one split. Questions that differ only in the order of
    their numbers are in the same split."""
    check_choice("split", split, SPLITS)
    kinds = rng.choices(list(KINDS), list(KINDS.values()), k=count)
    drawn = [draw_question(kind, rng) for kind in kinds]
    return [question for question in drawn if split_of(_sorted(question)) == split]


@cache
def questions(split: str) -> tuple[str, ...]:
    """Return the questions of one split, "train" or "test". There are not many different sums of
    two numbers, so that these come more than once."""
    return tuple(draw_questions(split, NUM_QUESTIONS, random.Random(0)))


def _sorted(question: str) -> str:
    sign = "*" if "*" in question else "+"
    return sign.join(sorted(question.removesuffix("=").split(sign)))


class Grader(DigitMachine):
    """A machine that reads a question such as "37*46=" and then the response, token by token. It is
    a `TokenModel`, the trunk of a scorer.

    The answer is what stands behind the last "}" or "?" of the response, or behind the question
    where there is none; it is right if it is the digits of the value from the first on, and then
    <eos>. States are (K, 5) int64: the sum of the terms so far, the product of the term being read,
    its operand being read, the place in the answer (-1 within the question), and whether the answer
    is right up to there (1 or 0). Any tokens can be read: the question ends at the first "=",
    tokens in it that are no digit or sign are skipped, an operand without digits is 0, and numbers
    are taken modulo `LARGEST_OPERAND` and `LARGEST`.
    """

    vocab_size = len(TOKENS)
    start = (0, 1, 0, -1, 1)

    def after(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Return the states (K, 5) after one more token (K,) each."""
        tokens = tokens.to(self.device, non_blocking=True)
        # Both continuations are computed for all rows, and the place chooses: no row may decide
        # what the device runs.
        asking = states[:, 3:4] < 0
        return torch.where(asking, self._asked(states, tokens), self._answered(states, tokens))

    def score(self, states: Tensor) -> Tensor:
        """Return 1 where the answer is right and has ended, else 0; (K,) float32."""
        return (self.progress(states) == 1).float()

    def progress(self, states: Tensor) -> Tensor:
        """Return the share of the right answer that stands, <eos> included, or 0 where something
        else stands there too; (K,) float32."""
        total, _, _, place, right = states.unbind(-1)
        whole = self._num_digits(total) + 1
        return torch.where((right == 1) & (place <= whole), place.clamp(min=0) / whole, 0.0).float()

    def _asked(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Return the states after a token of the question."""
        total, product, operand, place, right = states.unbind(-1)
        digit = tokens - ZERO
        longer = torch.where((digit >= 0) & (digit < 10), operand * 10 + digit, operand)
        times, ends = tokens == TIMES, (tokens == PLUS) | (tokens == EQUALS)
        term = product * operand % LARGEST
        columns = [
            torch.where(ends, (total + term) % LARGEST, total),
            torch.where(ends, 1, torch.where(times, term, product)),
            torch.where(times | ends, 0, longer % LARGEST_OPERAND),
            torch.where(tokens == EQUALS, 0, place),
            right,
        ]
        return torch.stack(columns, dim=-1)

    def _answered(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Return the states after a token of the response."""
        total, product, operand, place, right = states.unbind(-1)
        anew = (tokens == RESULT_END) | (tokens == ERROR)
        fits = right * (tokens == self._expected(total, place))
        after = torch.where(anew, 0, place + 1), torch.where(anew, 1, fits)
        return torch.stack([total, product, operand, *after], dim=-1)
