"""The credit that tokens were given, beside the exact one where an automaton gives the score.

Shapes: B texts, T tokens of one, K tokens of all.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tokenenv.agents import Agent
from tokenenv.agents.episodes import Episode
from tokenenv.agents.run.tracking import episode_record, token_columns
from tokenenv.envs.automata.oracle import AutomatonOracle
from tokenenv.models.pieces import TokenPieces

MOST_TEXTS = 256
"""Texts of which credit is looked at."""
SHOWN = 3
"""Texts of the first update, and of the last one, that are kept whole."""
LEAST = 3
"""Texts that a correlation needs at least."""


def exact_advantages(
    oracle: AutomatonOracle, episodes: Sequence[Episode], beta: float
) -> list[np.ndarray]:
    """Return Q(s, a) - V(s) of each text's tokens, (T,) each: at beta = inf those of the reference
    for the score, else those of the optimum.

    Those of a text add up to its score less V at the beginning, where nobody writes into it.
    """
    rows = [(episode, int(place)) for episode in episodes for place in episode.places]
    obs: dict[str, np.ndarray] = {
        "tokens": np.zeros((len(rows), oracle.max_length), dtype=np.int64),
        "own_mask": np.zeros((len(rows), oracle.max_length), dtype=np.int8),
        "length": np.array([place for _, place in rows]),
        "prompt_length": np.array([len(episode.prompt) for episode, _ in rows]),
    }
    for row, (episode, place) in enumerate(rows):
        obs["tokens"][row, :place] = episode.text[:place]
        obs["own_mask"][row, episode.places[episode.places < place]] = 1
    chosen = np.concatenate([episode.response for episode in episodes])
    found_K = oracle.q(obs, beta)[np.arange(len(rows)), chosen] - oracle.value(obs, beta)
    return np.split(found_K, np.cumsum([len(episode.response) for episode in episodes])[:-1])


def correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    """Return Pearson's correlation of two rows of numbers; None where one does not vary."""
    if len(one) < LEAST or min(np.ptp(one), np.ptp(other)) < 1e-9:
        return None
    return float(np.corrcoef(one, other)[0, 1])


def agreement(agent: Agent, episodes: Sequence[Episode], beta: float) -> float | None:
    """Return the correlation over tokens of the advantages that were learnt from with those of the
    optimum; None where either is not known."""
    known, exact = _both(agent, episodes, beta)
    return correlation(np.concatenate(known), np.concatenate(exact)) if known else None


def by_position(agent: Agent, episodes: Sequence[Episode]) -> dict[str, Any] | None:
    """Return, for each position of a text, how the advantages of the first update stand to the
    exact ones of the reference, which wrote its texts: lists with an entry a position.

    The advantages that are learnt from may be whitened, so their size is relative to the mean over
    all tokens; so is that of the exact ones. None where either is not known.
    """
    learnt, exact = _both(agent, episodes, math.inf)
    if not learnt:
        return None
    longest = max(map(len, exact))
    pairs = [
        tuple(np.array([row[t] for row in rows if len(row) > t]) for rows in (learnt, exact))
        for t in range(longest)
    ]
    sizes = [max(float(np.abs(np.concatenate(rows)).mean()), 1e-12) for rows in (learnt, exact)]
    return {
        "texts": [len(one) for one, _ in pairs],
        "correlation": [correlation(one, other) for one, other in pairs],
        "learnt_size": [float(np.abs(one).mean()) / sizes[0] for one, _ in pairs],
        "exact_size": [float(np.abs(other).mean()) / sizes[1] for _, other in pairs],
        "overall": correlation(np.concatenate(learnt), np.concatenate(exact)),
    }


def _both(
    agent: Agent, episodes: Sequence[Episode], beta: float
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the advantages that were learnt from, and the exact ones; nothing where either is not
    known."""
    oracle = getattr(agent.core, "oracle", None)
    some = [episode for episode in episodes if episode.advantage is not None][-MOST_TEXTS:]
    if not isinstance(oracle, AutomatonOracle) or not some:
        return [], []
    learnt = [np.asarray(episode.advantage, dtype=np.float64) for episode in some]
    return learnt, exact_advantages(oracle, some, beta)


def shown(agent: Agent, episodes: Sequence[Episode], beta: float) -> list[Mapping[str, Any]]:
    """Return a few texts of an update as JSON values: those of a line of `episodes.jsonl`, and
    `token_exact`, the advantages of the optimum, where they are known."""
    some, tokenizer = list(episodes[:SHOWN]), getattr(agent.spec, "tokenizer", None)
    oracle, pieces = getattr(agent.core, "oracle", None), TokenPieces(tokenizer)
    exact: list[dict[str, Any]] = [{} for _ in some]
    if isinstance(oracle, AutomatonOracle) and some:
        found = exact_advantages(oracle, some, beta)
        exact = [{"token_exact": [float(f"{one:.4g}") for one in row]} for row in found]
    about = {"update": agent.updates, "tokens_seen": agent.tokens_seen}
    return [
        about | episode_record(episode, tokenizer) | token_columns(episode, pieces) | more
        for episode, more in zip(some, exact, strict=True)
    ]
