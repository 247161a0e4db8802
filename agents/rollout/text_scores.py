"""Finished texts of an engine, scored by the env and made episodes of. Suffixes: T response
tokens."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from tokenenv.agents.episodes import Episode, told_apart
from tokenenv.agents.rollout.text import Text
from tokenenv.errors import NotFinite
from tokenenv.tables import by_name
from tokenenv.types import EpisodeScores, TokenSpec

logger = logging.getLogger("tokenenv")


class TextScores:
    """Makes episodes of finished texts, of some of them before their batch is whole."""

    def __init__(self, core: Any, *, num_texts: int, pays_logprob: bool) -> None:
        self.core, self.num_texts, self.pays_logprob = core, num_texts, pays_logprob
        self.has_potential = False
        self._ahead: dict[int, Episode] = {}
        """Those that were scored before they were asked for, by the number of the text."""
        self._failed = False

    @property
    def can_be_ahead(self) -> bool:
        """Whether a text is paid the same whenever it is scored, because no term learns from
        others, and nothing of this batch has failed."""
        return not (self._failed or getattr(self.core, "learns_from_texts", True))

    def score_ahead(self, texts: Sequence[Text]) -> None:
        """Score texts of a batch that is not whole yet. Where that fails they are scored when it
        is, which says why."""
        try:
            found = self._episodes(texts, played=False)
        except Exception as error:
            logger.info("texts are scored again at the end of their batch: %s", error)
            self._failed = True
            return
        self._ahead |= {text.number: one for text, one in zip(texts, found, strict=True)}

    def missing(self, texts: Sequence[Text]) -> list[Text]:
        """Return those of the texts that were not scored ahead."""
        return [text for text in texts if text.number not in self._ahead]

    def played(self, texts: Sequence[Text]) -> list[Episode]:
        """Return the episodes of a whole batch, in the order of the texts, which count as played.

        Raises `NotFinite`, whose `rows` are places in `texts`.
        """
        rest, self._failed = self.missing(texts), False
        try:
            found = self._episodes(rest, played=True) if rest else []
        except NotFinite as error:
            places = [row for row, text in enumerate(texts) if text.number not in self._ahead]
            error.rows = [places[row] for row in error.rows]
            raise
        known = self._ahead | {text.number: one for text, one in zip(rest, found, strict=True)}
        episodes = [known[text.number] for text in texts]
        if len(rest) < len(texts):
            self.core.tokens_seen += sum(len(one.response) for one in episodes)
            self.core.tokens_seen -= sum(len(one.response) for one in found)
        self._ahead = {}
        return episodes

    def continuations(self, texts: Sequence[Text]) -> list[Episode]:
        """Return the episodes of texts that do not count as played."""
        return self._episodes(texts, played=False)

    def forget(self) -> None:
        """Forget what was scored ahead."""
        self._ahead, self._failed = {}, False

    def _episodes(self, texts: Sequence[Text], *, played: bool) -> list[Episode]:
        scores = score_texts(self.core, texts, pays_logprob=self.pays_logprob, played=played)
        self.has_potential = scores.potentials is not None
        spec = self.core.token_spec
        return [
            episode_of(text, scores, row, spec, self.num_texts) for row, text in enumerate(texts)
        ]


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
