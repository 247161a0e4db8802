"""The true metric of finished texts, where it is not the sequence score itself."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from tokenenv.errors import InvalidArgument
from tokenenv.models.prefix_scores import is_scorer, score_texts
from tokenenv.rewards.rule import Rule
from tokenenv.rewards.seen import FinishedTexts
from tokenenv.rewards.term import Context
from tokenenv.types import Scorer, TextScorer


class Gold(Protocol):
    """What says the truth of finished texts: a `Rule`, or `TrueScore`."""

    @property
    def columns(self) -> Sequence[str]:
        """The columns that it reads of each prompt."""
        ...

    def numbers(self, texts: FinishedTexts, device: torch.device) -> Tensor:
        """Return the true metric of B texts, (B,) float32 on the device."""
        ...


@dataclass(frozen=True, slots=True)
class TrueScore:
    """The task's own score, where another reward model scores in its place."""

    scorer: Scorer | TextScorer
    max_batch_tokens: int
    columns: Sequence[str] = ()

    def numbers(self, texts: FinishedTexts, device: torch.device) -> Tensor:
        """Return the score of B texts, (B,) float32 on the device, each read as a whole."""
        pairs, own = texts.prompt_and_response_ids(), texts.own_responses()
        return score_texts(self.scorer, pairs, self.max_batch_tokens, own).to(device)


def gold_of(context: Context) -> Gold | None:
    """Return the task's true metric, where it is not the score; what it gives need not be
    finite. Raises `InvalidArgument` where a function asks for what the prompts do not have."""
    gold = context.task.gold
    if gold is None or isinstance(gold, str):
        return None
    if is_scorer(gold):
        return TrueScore(gold, context.max_batch_tokens)
    rule = copy.copy(gold) if isinstance(gold, Rule) else Rule(gold)
    try:
        rule.bind(replace(context, watched=True))
    except InvalidArgument as error:
        raise InvalidArgument(str(error).replace("reward='rule'", "gold=")) from error
    return rule
