"""One cell of a grid: a training run with all its settings, and the key of its file."""

import hashlib
import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tokenenv.agents.config import check_called
from tokenenv.agents.rollout.requirements import check_group_size, check_kl_settings
from tokenenv.bench.entries import AGENT, OPTIONS, SEED_OPTIONS, SETTINGS, check_place
from tokenenv.env.build import check_num_envs, check_terms, watched_terms
from tokenenv.env.config import EnvConfig
from tokenenv.errors import InvalidArgument, check_choice
from tokenenv.rewards.designs import make_terms

if TYPE_CHECKING:
    from tokenenv.cli.train import Train


@dataclass(frozen=True)
class Cell:
    """One training run of a grid."""

    task: str
    """The label of the environment."""
    row: str
    """The label of the row."""
    seed: int
    settings: Mapping[str, Any] = field(repr=False)
    """Those of `SETTINGS` that are given, the seed among the agent's."""
    points: int = field(repr=False)
    """How many times the policy is evaluated after the start, evenly apart in tokens."""
    texts: int = field(repr=False)
    """How many texts are sampled for an evaluation."""

    @cached_property
    def key(self) -> str:
        """A hash of what decides the numbers: settings, evaluation, and the version of tokenenv.
        Labels are no part of it."""
        import tokenenv

        parts = [self.settings, self.points, self.texts, tokenenv.__version__]
        text = json.dumps(parts, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """What the cell is called in sentences."""
        return f"{self.task} / {self.row} / seed {self.seed}"


def merged(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the settings of several parts: a later one goes before an earlier one, and the
    options and the agent's settings do so one by one."""
    found: dict[str, Any] = {"options": {}, "agent": {}}
    for part in parts:
        for name in (*SETTINGS, SEED_OPTIONS):
            if name in part:
                both = name in ("options", "agent")
                found[name] = {**found[name], **part[name]} if both else part[name]
    return found


def seeded(settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Return the settings of the cell that has a seed: it goes to the agent, and to the options of
    the environment that `SEED_OPTIONS` names."""
    plain = {name: value for name, value in settings.items() if name != SEED_OPTIONS}
    options = dict.fromkeys(settings.get(SEED_OPTIONS, ()), seed)
    return plain | {
        "options": settings["options"] | options,
        "agent": settings["agent"] | {"seed": seed},
    }


def check_decided(settings: Mapping[str, Any], seeds: Sequence[int]) -> None:
    """Raise `InvalidArgument` where one setting says what another one decides, so that it would be
    overruled without a word."""
    agent, options = settings["agent"], settings["options"]
    if "seed" in agent and list(seeds) != [agent["seed"]]:
        raise InvalidArgument(
            f"agent.seed={agent['seed']!r} would be overruled: the cells of a grid have the seeds "
            f"that its entry seeds says; leave it out, or write seeds: [{agent['seed']}]."
        )
    for name in settings.get(SEED_OPTIONS, ()):
        if name in options and list(seeds) != [options[name]]:
            raise InvalidArgument(
                f"options.{name}={options[name]!r} would be overruled: {SEED_OPTIONS} gives the "
                f"cell's seed to {name}; leave out one of the two."
            )
    for name in ("reward", "gold"):
        if name in options and settings.get(name) is not None:
            raise InvalidArgument(
                f"options.{name}={options[name]!r:.80} and {name}={settings[name]!r:.80} are the "
                "same setting, and one would overrule the other; leave out one of the two."
            )


def train_of(settings: Mapping[str, Any]) -> "Train":
    """Return the training that settings ask for. No model is loaded for it.

    Raises:
        InvalidArgument: a name is unknown, or a value is of another type or out of range.
    """
    # Imported here, because the command line imports this package.
    from tokenenv.cli.names import algorithm_of, env_id_of
    from tokenenv.cli.train import Train, known_options
    from tokenenv.safety.values import fit

    hints = typing.get_type_hints(Train)
    plain = [name for name in SETTINGS if name not in ("reward", "options", "agent")]
    given = {name: fit(name, settings[name], hints[name]) for name in plain if name in settings}
    # A reward may be a mixture, which `reward_of` reads.
    given |= {name: settings[name] for name in ("reward", "options") if name in settings}
    kind = algorithm_of(given.get("algo", Train.algo)).config_class
    hints, agent = typing.get_type_hints(kind), settings.get("agent", {})
    for name in [name for name in agent if name not in hints]:
        check_place("agent", name, AGENT)
        check_called(kind.__name__, name, list(hints))
        check_choice(f"the agent's setting of {kind.__name__}", name, hints)
    config = kind(**{name: fit(name, value, hints[name]) for name, value in agent.items()})
    train = Train(**given, agent=config)
    known = known_options(env_id_of(train.env), train.options)
    for name in [name for name in train.options if name not in known]:
        check_place("option", name, OPTIONS)
    train.env_keywords()
    return train


def check_together(train: "Train") -> None:
    """Raise `InvalidArgument` where a training could not begin: all that an environment and an
    agent refuse when they are made, as far as it is known before a model is loaded."""
    options = {one.name for one in fields(EnvConfig)}
    given = {name: value for name, value in train.env_keywords().items() if name in options}
    config, agent = EnvConfig(**given), train.agent
    check_num_envs(train.num_envs, config)
    terms = {} if config.reward is None else make_terms(config.reward)
    check_terms(terms, watched_terms(config, terms), config)
    if config.observation != "tokens":
        raise InvalidArgument(f"observation={config.observation!r}: the agents read tokens.")
    if train.algorithm.grouped:
        check_group_size(config.group_size, train.algorithm.__name__)
    check_kl_settings(config.kl, config.kl_coef, agent.kl_coef, agent.kl_target)
