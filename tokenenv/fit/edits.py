"""Token labels by what differs between the texts of a pair."""

from collections.abc import Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from tokenenv.fit.examples import Example, Text

if TYPE_CHECKING:
    from tokenenv.fit.labels import LabelContext

COMMON = 0.5
"""The label of a token that both texts have. Its log-odds, the reward, are 0."""


def label_edits(examples: Sequence[Example], context: "LabelContext") -> list[Example]:
    """Label the own tokens of a better and a worse text: 1 those that the better one alone has, 0
    those that the worse one alone has, and 0.5 those that both have (TLCR, Yoon et al. 2024, arXiv
    2407.16574, in which a language model revises the worse text by as few edits as it can).

    What both have in common is what no edit touched, so it is neither good nor bad, and is paid
    nothing. In texts that were written apart, and not one by an edit of the other, what they have
    in common is chance, and a label says little more than which text the token stands in. Of a
    ranking each text is compared with the next one. Tokens are matched by `difflib`, whoever wrote
    them; tokens that are not own get no label.

    Returns:
        two examples of one text for each comparison.
    """
    return [
        Example((labelled,), where=example.where)
        for example in examples
        for better, worse in pairwise(example.texts)
        for labelled in edited(better, worse)
    ]


def edited(better: Text, worse: Text) -> tuple[Text, Text]:
    """Return the two texts with labels for their own tokens."""
    matcher = SequenceMatcher(
        None, better.response.tolist(), worse.response.tolist(), autojunk=False
    )
    labels = np.ones(len(better.response)), np.zeros(len(worse.response))
    for block in matcher.get_matching_blocks():
        labels[0][block.a : block.a + block.size] = COMMON
        labels[1][block.b : block.b + block.size] = COMMON
    return with_target(better, labels[0]), with_target(worse, labels[1])


def with_target(text: Text, target: np.ndarray) -> Text:
    """Return the text with a target (R,) for its own tokens, NaN for the others."""
    return replace(text, target=np.where(text.own_mask, target, np.nan).astype(np.float32))
