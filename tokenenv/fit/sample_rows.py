"""Rows of data.jsonl, from texts that an environment has scored.

Suffix: G texts of a prompt.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tokenenv.agents.episodes import Episode
from tokenenv.fit.advantages import placed
from tokenenv.fit.continuations import Values
from tokenenv.fit.examples import Text
from tokenenv.types import TokenSpec

Row = dict[str, Any]
"""A line of data.jsonl."""


class Rows:
    """Makes rows of texts, with the columns that `tokenenv fit` reads.

    Args:
        spec: the env's.
        lists: whether a ranking has lists of texts even where it has two.
    """

    def __init__(self, spec: TokenSpec, lists: bool) -> None:
        self.spec, self.lists = spec, lists

    def row(self, episode: Episode) -> Row:
        """Return the row of one text."""
        truncated = {"truncated": bool(episode.truncated)}
        return self.prompt(episode) | self.response(episode) | truncated

    def ranking(self, group: Sequence[Episode], scores: list[float], noise: float) -> Row:
        """Return the row of a ranking, the best text first: a pair where there are two texts."""
        row, truncated = self.prompt(group[0]), [bool(e.truncated) for e in group]
        if len(group) == 2 and not self.lists:
            for name, episode, score in zip(("chosen", "rejected"), group, scores, strict=True):
                row |= self.response(episode, name, f"{name}_own") | {f"{name}_score": score}
            return row | {"truncated": truncated}
        texts = [self.response(e, "responses", "responses_own") for e in group]
        lists = {name: [text[name] for text in texts] for name in texts[0]}
        # Readers rank by "scores", and noise has ranked otherwise.
        column = "true_scores" if noise else "scores"
        return row | lists | {column: scores, "truncated": truncated}

    def prompt(self, episode: Episode) -> Row:
        """Return the columns of a text's prompt."""
        columns = {"columns": dict(episode.columns)} if episode.columns else {}
        return self.text("prompt", episode.prompt.tolist(), skip=True) | columns

    def response(self, episode: Episode, name: str = "response", own: str = "own") -> Row:
        """Return the columns of a text's response."""
        marks = {own: episode.own.astype(int).tolist()} if self.spec.responds else {}
        return self.text(name, episode.after_prompt.tolist()) | marks

    def text(self, name: str, ids: list[int], skip: bool = False) -> Row:
        """Return a text as a column, where there is a tokenizer, and its token ids as another.

        The text has no stop token at its end, which readers of texts add themselves, and with
        `skip` no special tokens unless it has nothing else.
        """
        if self.spec.tokenizer is None:
            return {f"{name}_ids": ids}
        shown = ids[:-1] if ids[-1] in self.spec.stop_token_ids else ids
        decode = self.spec.tokenizer.decode
        text = decode(shown, skip_special_tokens=True) if skip else ""
        return {name: text or decode(shown, skip_special_tokens=False), f"{name}_ids": ids}


def ranked(scores_G: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    """Return the places of texts, the best first.

    Without noise a text with the score of an earlier one is left out, so that no text is called
    better than one that is as good. With noise the order is drawn from Plackett-Luce with the
    strengths exp(score / noise), by adding Gumbel noise (Yellott 1977); of two texts that is
    Bradley-Terry.
    """
    if noise:
        return np.argsort(-(scores_G / noise + rng.gumbel(size=len(scores_G))), kind="stable")
    _, first = np.unique(scores_G, return_index=True)
    return first[::-1]


def text_of(row: Row) -> Text:
    """Return the text of a row with one response."""
    own = np.array(row["own"], dtype=bool) if "own" in row else None
    return Text(np.array(row["prompt_ids"]), np.array(row["response_ids"]), own=own)


def value_columns(text: Text, found: Values) -> Row:
    """Return the columns of a text's values."""
    row: Row = {"prompt_value": found.value[0], "prompt_value_error": found.error[0]}
    for name, numbers in (("values", found.value), ("value_errors", found.error)):
        row[name] = [None if math.isnan(n) else n for n in placed(text, numbers[1:]).tolist()]
    return row | {name: float(row[name]) for name in ("prompt_value", "prompt_value_error")}
