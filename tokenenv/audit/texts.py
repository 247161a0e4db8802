"""Texts and what they are paid, as the audit reads them.

Shapes: B texts, T response tokens of the policy's own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from tokenenv.agents.rollout.text import Text
from tokenenv.env.vector_env import TokenVectorEnv
from tokenenv.tables import by_name
from tokenenv.types import EpisodeScores

KL = "kl"
"""The name of the term that the audit leaves out: it is the price of moving, not what is sought."""
CHUNK = 16_384
"""Texts that are scored in one call, so that progress can be shown."""

OnText = Callable[[int, int], None]
"""Called with the texts that are done and those that will be."""


def no_listener(done: int, asked: int) -> None:
    """Do nothing."""


class Estimate(NamedTuple):
    """A number with its standard error, 0 where the number is exact and NaN where no error is
    known."""

    value: float
    error: float


@dataclass(frozen=True, slots=True)
class Paid:
    """B texts with what they earn, without the KL term."""

    texts: Sequence[Text]
    token_BT: np.ndarray
    """float64: the reward of each own token, placed; 0 beyond."""
    gold_B: np.ndarray | None
    score_B: np.ndarray | None
    length_B: np.ndarray
    """int64: own tokens."""
    log_ref_B: np.ndarray
    """float64: log pi_ref of the text, in nats."""
    cut_B: np.ndarray
    """bool: the texts that were cut."""

    @property
    def proxy_B(self) -> np.ndarray:
        """float64: what each text earns."""
        return self.token_BT.sum(1)

    @property
    def group_B(self) -> np.ndarray:
        """int64: the number of each text's prompt, from 0 on without gaps."""
        return np.unique([text.prompt_id for text in self.texts], return_inverse=True)[1]

    @property
    def share_B(self) -> np.ndarray:
        """float64: each text's share among the texts of its prompt."""
        group_B = self.group_B
        return 1.0 / np.bincount(group_B)[group_B]

    def at(self, rows: np.ndarray) -> "Paid":
        """Return the texts `rows`."""

        def some(values: np.ndarray | None) -> Any:
            return None if values is None else values[rows]

        return Paid(
            [self.texts[row] for row in np.arange(len(self.texts))[rows]],
            some(self.token_BT),
            some(self.gold_B),
            some(self.score_B),
            some(self.length_B),
            some(self.log_ref_B),
            some(self.cut_B),
        )


def pay(envs: TokenVectorEnv, texts: Sequence[Text], on_text: OnText = no_listener) -> Paid:
    """Score whole texts with the env's present weights and statistics, and leave the KL term
    out."""
    parts = []
    for start in range(0, len(texts), CHUNK):
        parts.append(_paid(envs, texts[start : start + CHUNK]))
        on_text(min(start + CHUNK, len(texts)), len(texts))
    if len(parts) == 1:
        return parts[0]

    def joined(name: str) -> Any:
        arrays = [getattr(part, name) for part in parts]
        return None if arrays[0] is None else np.concatenate(arrays)

    names = ("token_BT", "gold_B", "score_B", "length_B", "log_ref_B", "cut_B")
    return Paid(texts, **{name: joined(name) for name in names})


def _paid(envs: TokenVectorEnv, texts: Sequence[Text]) -> Paid:
    scores = score(envs, texts)
    gold, score_B = (
        None if values is None else values.astype(np.float64)
        for values in (scores.gold, scores.score)
    )
    return Paid(
        texts,
        without_kl(scores.token_reward_terms, scores.token_rewards),
        gold,
        score_B,
        scores.lengths.astype(np.int64),
        scores.ref_logprobs.astype(np.float64).sum(1),
        np.asarray([text.truncated for text in texts], dtype=bool),
    )


def score(envs: TokenVectorEnv, texts: Sequence[Text]) -> EpisodeScores:
    """Score whole texts. Terms that read log pi are given that of the reference."""
    given: dict[str, Any] = {"truncated": [text.truncated for text in texts]}
    columns = by_name([text.columns for text in texts])
    given |= {"columns": columns} if columns else {}
    if envs.token_spec.responds:
        given["own"] = [text.own for text in texts]
        given["turn_rewards"] = [text.turn_reward for text in texts]
    both = [text.prompt for text in texts], [text.tokens for text in texts]
    if envs.config.kl != "policy":
        return envs.score_episodes(*both, **given)
    # The reference's log-probs come from scoring too, so the texts are scored twice.
    counts = [sum(text.own) for text in texts]
    blank = [[0.0] * count for count in counts]
    found = envs.score_episodes(*both, logprobs=blank, **given).ref_logprobs
    drawn = [row[:count] for row, count in zip(found, counts, strict=True)]
    return envs.score_episodes(*both, logprobs=drawn, **given)


def without_kl(terms: dict[str, np.ndarray], total: np.ndarray) -> np.ndarray:
    """Return the sum (B, T) float64 of the terms without the KL term; `total` gives the shape."""
    out = np.zeros(total.shape)
    for name, values in terms.items():
        if name != KL:
            out += values
    return out


def with_gold(paid: Paid) -> Paid:
    """Return the texts whose gold is a number; all where no text's is known."""
    if paid.gold_B is None:
        return paid
    known = np.isfinite(paid.gold_B)
    if not known.any():
        return replace(paid, gold_B=None)
    return paid if known.all() else paid.at(known)
