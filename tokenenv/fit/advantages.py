"""The true credit of each token, to hold token rewards against.

Suffixes: R response tokens, K states, L tokens of the longest text, V vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from gymnasium.vector import VectorEnv

from tokenenv.errors import InvalidArgument, check_choice
from tokenenv.fit.continuations import prefix_values
from tokenenv.fit.examples import Text

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


def monte_carlo_advantages(
    envs: VectorEnv, texts: Sequence[Text], scores: Sequence[float], **settings: Any
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the estimated advantage of each token, (R,) float64 for each text, and its standard
    error; NaN on tokens that the environment wrote.

    It is the difference of the values before and after a token, each by continuations of its own:
    of the reference's score, or with `beta` of score - beta KL at its optimum. The arguments are
    those of `prefix_values`; what it raises and leaves out is said there.
    """
    found = prefix_values(envs, texts, scores, **settings)
    return [
        (placed(text, np.diff(value)), placed(text, np.hypot(error[1:], error[:-1])))
        for text, (value, error) in zip(texts, found, strict=True)
    ]


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
