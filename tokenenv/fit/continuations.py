"""Values of beginnings of texts, by what the reference writes after them.

Suffixes: R response tokens, T own tokens, M continuations.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np
from gymnasium.vector import VectorEnv

from tokenenv.agents.config import AgentConfig
from tokenenv.agents.rollout.actor import Actor
from tokenenv.agents.rollout.collector import Collector, Prefix
from tokenenv.agents.rollout.env_rows import env_core, method
from tokenenv.agents.rollout.make import default_policy
from tokenenv.agents.rollout.requirements import check_env
from tokenenv.errors import InvalidArgument, NotReset
from tokenenv.fit.examples import Text
from tokenenv.tables import Columns


class Values(NamedTuple):
    """Estimated values of the beginnings of one text."""

    value: np.ndarray
    """(T + 1,) float64: of the prompt, then of the text after each own token; NaN where none was
    estimated. The last one is the text's own score."""
    error: np.ndarray
    """(T + 1,) float64: their standard errors; 0 for the last one."""


def prefix_values(
    envs: VectorEnv,
    texts: Sequence[Text],
    scores: Sequence[float],
    *,
    columns: Sequence[Columns] = (),
    by: str = "gold",
    continuations: int = 16,
    every: int = 1,
    beta: float | None = None,
    seed: int = 0,
    on_text: Callable[[int, int], None] | None = None,
) -> list[Values]:
    """Return the values of the beginnings of finished texts, from `continuations` of each by the
    reference.

    The value is the mean score of the continuations (Math-Shepherd, Wang et al. 2024, arXiv
    2312.08935) or, with `beta`, beta log mean exp(score / beta), which estimates V* of score - beta
    KL from the reference's own texts (A*-PO, Brantley et al. 2025, arXiv 2505.20686). That estimate
    is low by about variance / (2 beta M), because a logarithm of a mean is.

    Where the environment writes into texts, the text after an own token is taken with what was
    written behind it. The value is then that of the answer which this text got, and its standard
    error is that of the continuations alone.

    The texts that run in the env go on afterwards where they were.

    Args:
        scores: of the texts, which are the last values.
        columns: what belongs to the prompt of each text.
        by: "gold" or "score", as the scores are.
        every: values are estimated after every so many own tokens, and for the prompt.
        beta: reward per nat, above 0; None: the mean.
        seed: of everything random.
        on_text: is called with the continuations that there are, and those that there will be.

    Raises:
        InvalidArgument: an argument is not allowed, the env cannot fork its texts, or it
            gives them no score.
    """
    check(envs, continuations, every, beta)
    states = [state for text in texts for state in _states(text, every)]
    of_text = [i for i, text in enumerate(texts) for _ in _valued(text, every)]
    rows = [columns[i] for i in of_text] if columns else []
    found = iter(_scores(envs, states, rows, by, continuations, seed, on_text))
    return [
        _values(text, every, score, beta, found) for text, score in zip(texts, scores, strict=True)
    ]


def check(envs: VectorEnv, continuations: int, every: int, beta: float | None) -> None:
    """Raise `InvalidArgument` for what `prefix_values` does not take."""
    check_env(envs)
    for name, value, least in (("continuations", continuations, 2), ("every", every, 1)):
        if not isinstance(value, int) or value < least:
            raise InvalidArgument(f"{name}={value!r} must be a whole number, {least} or more.")
    if beta is not None and not 0 < beta < math.inf:
        raise InvalidArgument(f"beta={beta} must be finite and above 0 (reward per nat), or None.")
    if method(envs, "fork") is None:
        raise InvalidArgument(f"{type(env_core(envs)).__name__} cannot fork its texts.")
    if continuations > envs.num_envs:
        raise InvalidArgument(
            f"continuations={continuations} do not fit into {envs.num_envs} slots; make the env "
            f"with num_envs={continuations} or more."
        )


def estimate(scores_M: np.ndarray, beta: float | None) -> tuple[float, float]:
    """Return the value of a beginning from the scores of its continuations, and its standard error
    (with `beta` to first order)."""
    if beta is None:
        return float(scores_M.mean()), standard_error(scores_M)
    # The best score is subtracted first, so that no exponential overflows.
    best = scores_M.max()
    weights_M = np.exp((scores_M - best) / beta)
    mean = weights_M.mean()
    return float(best + beta * np.log(mean)), beta * standard_error(weights_M) / float(mean)


def standard_error(values_M: np.ndarray) -> float:
    """Return the standard error of the mean."""
    return float(values_M.std(ddof=1) / math.sqrt(len(values_M)))


def _valued(text: Text, every: int) -> list[int]:
    """Return the numbers of the own tokens before which a value is estimated."""
    return list(range(0, int(text.own_mask.sum()), every))


def _states(text: Text, every: int) -> list[Prefix]:
    """Return the states that these own tokens were chosen in."""
    places, own = np.flatnonzero(text.own_mask), text.own
    return [
        Prefix(text.prompt, text.response[:place], None if own is None else own[:place])
        for place in places[_valued(text, every)]
    ]


def _values(
    text: Text, every: int, score: float, beta: float | None, found: Iterator[np.ndarray]
) -> Values:
    value, error = np.full((2, int(text.own_mask.sum()) + 1), np.nan)
    for number in _valued(text, every):
        value[number], error[number] = estimate(next(found), beta)
    value[-1], error[-1] = score, 0.0
    return Values(value, error)


def _scores(
    envs: VectorEnv,
    states: Sequence[Prefix],
    columns: Sequence[Columns],
    by: str,
    continuations: int,
    seed: int,
    on_text: Callable[[int, int], None] | None,
) -> list[np.ndarray]:
    """Return the scores (M,) of the continuations of each state."""
    policy = default_policy(envs, AgentConfig(), learns=False)
    collector = Collector(envs, Actor(policy, seed=seed), seed=seed)
    at_once, asked = envs.num_envs // continuations, len(states) * continuations
    found: list[np.ndarray] = []
    with running_texts_kept(envs):
        collector.reset()
        for first in range(0, len(states), at_once):
            some = slice(first, first + at_once)
            # What runs here is nobody's, so it is not taken up again.
            collector.running = False
            episodes = collector.play_on(states[some], continuations, columns[some])
            scores = np.array([plain(getattr(episode, by)) for episode in episodes])
            if np.isnan(scores).any():
                raise InvalidArgument(
                    f"by={by!r}: the env gives a text no {by}; allowed: the other one of 'gold' "
                    f"and 'score'."
                )
            if on_text is not None:
                on_text(min((first + at_once) * continuations, asked), asked)
            found += [*scores.reshape(-1, continuations)]
    return found


def plain(score: float) -> float:
    """Return a float32 as the shortest float that rounds to it: 0.2, and not 0.20000000298."""
    return float(str(np.float32(score)))


@contextmanager
def running_texts_kept(envs: VectorEnv) -> Iterator[None]:
    """Around what writes other texts in an env: those that run go on where they were."""
    saved: Any = None
    with suppress(NotReset):
        saved = method(envs, "save_state")()
    try:
        yield
    finally:
        if saved is not None:
            method(envs, "load_state")(saved)
