"""The true credit of each token, to hold token rewards against.

Suffixes: R response tokens, K states, L tokens of the longest text, V vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from gymnasium.vector import VectorEnv

from tokenenv.errors import InvalidArgument, check_choice
from tokenenv.fit.continuations import plain, prefix_values
from tokenenv.fit.examples import Text
from tokenenv.tables import Columns, by_name

AT_ONCE = 64
"""Texts whose states are read together: it bounds memory."""


def exact_advantages(
    envs: VectorEnv,
    texts: Sequence[Text],
    of: Literal["optimal", "reference"] = "optimal",
    beta: float | None = None,
) -> list[np.ndarray]:
    """Return the exact advantage of each token, (R,) float64 for each text; NaN on tokens that the
    environment wrote.

    "optimal" is Q*(s, a) - V*(s) of score - beta KL, and "reference" is that of the reference's own
    score, Q(s, a) - V(s) with V the mean score of its continuations (`AutomatonOracle` has the
    formulas). Where a token is answered, Q is the expectation over the answers.

    Args:
        envs: an env whose optimum is known (`envs.unwrapped.oracle`).
        texts: texts of this env, each from its prompt on.
        of: whose advantage.
        beta: reward per nat, for "optimal"; None: the env's own.

    Raises:
        InvalidArgument: the env has no oracle, or the texts are not of this env.
    """
    check_choice("of", of, ("optimal", "reference"))
    core: Any = envs.unwrapped
    if getattr(core, "oracle", None) is None:
        raise InvalidArgument(
            f"envs={type(core).__name__} of {getattr(envs.spec, 'id', 'no id')} has no exact "
            f"optimum; the advantage of its tokens can be estimated by monte_carlo_advantages."
        )
    if of == "reference":
        beta = math.inf
    elif beta is None:
        beta = 0.0 if core.config.kl == "none" else core.kl_coef
    starts = range(0, len(texts), AT_ONCE)
    return [a for i in starts for a in _advantages(core, texts[i : i + AT_ONCE], beta)]


def _advantages(core: Any, texts: Sequence[Text], beta: float) -> list[np.ndarray]:
    obs = states_of(texts, core.token_spec.max_length)
    tokens_K = np.concatenate([text.response[text.own_mask] for text in texts])
    q_K = core.oracle.q(obs, beta)[np.arange(len(tokens_K)), tokens_K]
    own = iter(np.split(q_K - core.oracle.value(obs, beta), _ends(texts)))
    return [placed(text, next(own)) for text in texts]


def _ends(texts: Sequence[Text]) -> np.ndarray:
    """Return where the own tokens of each text but the last end, when all are in one row."""
    return np.cumsum([text.own_mask.sum() for text in texts])[:-1]


class Credit(NamedTuple):
    """Estimated advantages."""

    mean: list[np.ndarray]
    """(R,) float64 for each text; NaN on tokens that the environment wrote."""
    error: list[np.ndarray]
    """(R,) float64: their standard errors."""

    @property
    def reliability(self) -> float:
        """The share of the variance of `mean` that is no error of the estimate: the square of its
        correlation with the true advantages is about this."""
        mean, error = (np.concatenate(rows) for rows in self)
        own = ~np.isnan(mean)
        return float(1 - np.mean(error[own] ** 2) / np.var(mean[own]))


def monte_carlo_advantages(
    envs: VectorEnv,
    texts: Sequence[Text],
    *,
    scores: Sequence[float] | None = None,
    by: str = "gold",
    **settings: Any,
) -> Credit:
    """Return the estimated advantage of each token: the difference of the values before and behind
    it, each from continuations of its own by the reference.

    The value is the mean score or, with `beta`, V* of score - beta KL. Other arguments are those
    of `prefix_values`, which also says what it raises. Without `scores` the env scores the texts,
    and those that do not end in a stop token count as cut.
    """
    if scores is None:
        scores = scores_of(envs, texts, by, settings.get("columns", ()))
    found = prefix_values(envs, texts, scores, by=by, **settings)
    pairs = list(zip(texts, found, strict=True))
    return Credit(
        [placed(text, np.diff(one.value)) for text, one in pairs],
        [placed(text, np.hypot(one.error[1:], one.error[:-1])) for text, one in pairs],
    )


def scores_of(
    envs: VectorEnv, texts: Sequence[Text], by: str, columns: Sequence[Columns]
) -> list[float]:
    """Return the gold scores, or the scores, of finished texts."""
    core: Any = envs.unwrapped
    own = [text.own_mask.tolist() for text in texts] if core.token_spec.responds else None
    found = core.score_episodes(
        [text.prompt for text in texts],
        [text.response for text in texts],
        columns=by_name(columns) or None,
        own=own,
    )
    return [plain(score) for score in getattr(found, by)]


def placed(text: Text, values: np.ndarray) -> np.ndarray:
    """Return (R,) float64: the `values` of a text's own tokens, in order, and NaN on others."""
    row = np.full(len(text.response), np.nan)
    row[text.own_mask] = values
    return row


def states_of(texts: Sequence[Text], max_length: int) -> Mapping[str, np.ndarray]:
    """Return the observation (K) of the states that the own tokens of all texts were chosen in,
    text after text."""
    places = [np.flatnonzero(text.own_mask) for text in texts]
    length_K = np.concatenate([len(t.prompt) + at for t, at in zip(texts, places, strict=True)])
    counts = list(map(len, places))
    blank = np.zeros((len(texts), max_length), dtype=np.int64)
    tokens, own, prompts = blank, blank.astype(np.int8), np.zeros(len(texts), dtype=np.int64)
    for row, text in enumerate(texts):
        prompts[row] = len(text.prompt)
        tokens[row, : len(text)] = text.ids
        own[row, len(text.prompt) : len(text)] = text.own_mask
    seen = np.arange(max_length) < length_K[:, None]
    return {
        "tokens": np.repeat(tokens, counts, axis=0) * seen,
        "own_mask": np.repeat(own, counts, axis=0) * seen,
        "length": length_K,
        "prompt_length": np.repeat(prompts, counts),
    }
