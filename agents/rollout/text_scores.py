"""Finished texts of an engine, scored by the env and made episodes of. Suffixes: T response
tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tokenenv.agents.episodes import Episode, told_apart
from tokenenv.agents.rollout.text import Text
from tokenenv.errors import NotFinite
from tokenenv.tables import by_name
from tokenenv.types import EpisodeScores, TokenSpec


def score_texts(
    core: Any, texts: Sequence[Text], *, pays_logprob: bool, played: bool = True
) -> EpisodeScores:
    """Have the env score finished texts, by default as `played` ones. Raises `NotFinite`, naming
    the texts."""
    columns = by_name([text.columns for text in texts])
    given: dict[str, Any] = {"columns": columns} if columns else {}
    if pays_logprob:
        # A prefix was not drawn. Its penalty is dropped below, so any number will do.
        given["logprobs"] = [_behind_prefix(text, text.logprob) for text in texts]
    if core.token_spec.responds:
        given["own"] = [[*text.prefix_own, *text.own] for text in texts]
        given["turn_rewards"] = [_behind_prefix(text, text.turn_reward) for text in texts]
        given["truncated"] = [text.truncated for text in texts]
    try:
        return core.score_episodes(
            [text.prompt for text in texts],
            [[*text.prefix, *text.tokens] for text in texts],
            weights={name: [text.weights[name] for text in texts] for name in texts[0].weights},
            played=played,
            **given,
        )
    except NotFinite as error:
        error.texts = [texts[row] for row in error.rows]
        raise


def _behind_prefix(text: Text, values: Sequence[float]) -> list[float]:
    """The numbers of all tokens that count as the policy's: 0 for those of the prefix."""
    return [*[0.0] * sum(text.prefix_own), *values]


def episode_of(
    text: Text, scores: EpisodeScores, row: int, spec: TokenSpec, num_texts: int
) -> Episode:
    """Return the episode of a finished text, whose scores are in this row; `num_texts` run side by
    side."""
    # Rewards and the like of a prefix are dropped: it belongs to the prompt of an episode.
    start = sum(text.prefix_own)
    end = start + len(text.logprob)
    potential = np.zeros(end - start + 1, np.float32)
    if scores.potentials is not None:
        potential = scores.potentials[row, start : end + 1]

    def own_tokens(by_name: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: values[row, start:end] for name, values in by_name.items()}

    before = len(text.prompt) + len(text.prefix)
    return Episode(
        prompt=np.asarray([*text.prompt, *text.prefix], np.int64),
        **told_apart(np.asarray(text.so_far, np.int64), before + np.flatnonzero(text.own)),
        logprob=np.asarray(text.logprob, np.float32),
        ref_logprob=scores.ref_logprobs[row, start:end],
        reward=scores.token_rewards[row, start:end],
        potential=potential,
        drawn_value=np.asarray(text.value, np.float32),
        kl_coef=text.weights.get("kl", 0.0),
        terminated=text.terminated,
        truncated=text.truncated,
        score=float("nan") if scores.score is None else float(scores.score[row]),
        gold=float("nan") if scores.gold is None else float(scores.gold[row]),
        prompt_id=text.prompt_id,
        slot=text.number % num_texts,
        index=text.number // num_texts,
        version=text.version,
        bootstraps=text.truncated and not spec.score_truncated,
        terms=own_tokens(scores.token_reward_terms),
        watched=own_tokens(scores.watched),
        columns=text.columns,
        reward_version=-1 if scores.reward_version is None else scores.reward_version,
    )
