"""Playing one cell: training, and the figures on the way."""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from tokenenv.agents import Agent
from tokenenv.agents.episodes import Episode, mean_of, reward_without_kl
from tokenenv.bench.cells import train_of
from tokenenv.bench.credit import agreement, by_position, shown
from tokenenv.bench.entries import SETTINGS
from tokenenv.bench.measure import Measure, beta_of, filled, make_measure
from tokenenv.bench.reading import ReadTokens
from tokenenv.bench.versions import versions

OnTokens = Callable[[int, int], None]
"""Is called with the tokens that have been seen, and with those of the whole run."""
TRAINED: dict[str, Callable[[Episode], float]] = {
    "train_proxy": reward_without_kl,
    "train_gold": lambda episode: episode.gold,
    "train_gap": lambda episode: reward_without_kl(episode) - episode.gold,
    "train_score": lambda episode: episode.score,
    "train_kl": lambda episode: episode.kl,
    "train_length": lambda episode: len(episode.response),
}
"""Means over the texts that were learnt from since the point before."""


def no_listener(seen: int, total: int) -> None:
    """Hear nothing."""


def play(
    settings: Mapping[str, Any], points: int, texts: int, on_tokens: OnTokens = no_listener
) -> dict[str, Any]:
    """Train as `settings` say, in this process and on one thread, and return the record of a cell.

    Args:
        settings: those of a `Cell`.
        points: how many times the policy is evaluated after the start.
        texts: how many texts are sampled for an evaluation.
        on_tokens: is called after each update.

    Returns:
        A mapping of plain values: `settings` with every default written out, `model`, `versions`,
        `warnings`, `points`, a list of mappings, `credit` and `texts` (docs/bench.md names their
        entries).
    """
    torch.set_num_threads(1)
    train = train_of(settings)
    # Several processes share a screen: what they warn of is kept, and not printed.
    with warnings.catch_warnings(record=True) as warned:
        agent = train.algorithm(train.make_envs(), train.agent)
        measure = make_measure(train, agent, texts)
        curve = Curve(agent, measure, train.total_tokens, points, on_tokens)
        curve.learn()
    saved = train.as_run(agent).saved()
    return {
        "settings": {name: saved[name] for name in SETTINGS},
        "model": _size(agent),
        "versions": versions(),
        "warnings": list(dict.fromkeys(str(one.message) for one in warned)),
        "points": curve.points,
        "credit": curve.credit,
        "texts": curve.texts,
    }


def _size(agent: Agent) -> dict[str, int]:
    """Return how many weights the policy has, its critic's included, and how many are trained."""
    weights = list(agent.policy.parameters())
    trained = (weight.numel() for weight in weights if weight.requires_grad)
    return {
        "policy_weights": sum(weight.numel() for weight in weights),
        "trained_weights": sum(trained),
    }


class Curve:
    """The evaluations of one run as it learns. They are no part of the times that it records, nor
    of the tokens.

    Args:
        agent: a new one.
        measure: evaluates its policy.
        total: tokens of the run.
        points: how many evaluations follow that of the start.
        on_tokens: is called after each update.
    """

    def __init__(
        self, agent: Agent, measure: Measure, total: int, points: int, on_tokens: OnTokens
    ) -> None:
        self.agent, self.measure, self.total, self.on_tokens = agent, measure, total, on_tokens
        self.due = [total * number / points for number in range(1, points + 1)]
        self.points: list[dict[str, Any]] = []
        self.credit: dict[str, Any] | None = None
        """The advantages of the first update beside the exact ones, position by position."""
        self.texts: list[Mapping[str, Any]] = []
        """A few texts of the first update and of the last one."""
        self._beta = beta_of(agent)
        self._last: Sequence[Episode] = ()
        self._episodes: list[Episode] = []
        self._read = ReadTokens(agent.core)
        self._seconds = self._cpu = 0.0
        self._began = time.perf_counter(), time.process_time()

    def learn(self) -> None:
        """Train to the end."""
        self._point()
        self.agent.learn(self.total, on_update=self._after_update)
        if self.points[-1]["tokens"] < self.agent.tokens_seen:  # the run ended before its budget
            self._point()
        self.texts += shown(self.agent, self._last, self._beta)

    def _after_update(self, metrics: Mapping[str, float], episodes: Sequence[Episode]) -> None:
        if not self._last:
            with self._aside():
                self.credit = by_position(self.agent, episodes)
                self.texts += shown(self.agent, episodes, self._beta)
        self._last = episodes
        self._episodes += episodes
        seen = self.agent.tokens_seen
        if self.due and seen >= self.due[0]:
            self.due = [tokens for tokens in self.due if tokens > seen]
            self._point()
        self.on_tokens(seen, self.total)

    def _point(self) -> None:
        """Evaluate the policy."""
        with self._aside():
            about = {
                "point": len(self.points),
                "tokens": self.agent.tokens_seen,
                "reward_tokens": self._read.count,
                "updates": self.agent.updates,
                "seconds": self._seconds,
                "cpu_seconds": self._cpu,
            }
            self.points.append(about | self.measure() | self._trained())
            self._episodes = []

    def _trained(self) -> dict[str, Any]:
        """Return the columns about the texts that were learnt from since the point before."""
        means = {name: mean_of([of(e) for e in self._episodes]) for name, of in TRAINED.items()}
        return {
            "train_texts": len(self._episodes),
            **filled(means, tuple(TRAINED)),
            "train_credit": agreement(self.agent, self._episodes, self._beta),
        }

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Stop the clocks, and count no tokens that are read meanwhile."""
        wall, cpu = time.perf_counter(), time.process_time()
        if self.points:  # what comes before the first one is no learning
            self._seconds += wall - self._began[0]
            self._cpu += cpu - self._began[1]
        with self._read.paused():
            yield
        self._began = time.perf_counter(), time.process_time()
