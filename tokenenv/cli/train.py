"""`tokenenv train`, and the config that its run folders hold."""

import dataclasses
import time
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast

import gymnasium as gym

from tokenenv.agents import ALGORITHMS, Agent, AgentConfig, PPOConfig
from tokenenv.agents.episodes import Episode
from tokenenv.agents.tracking import WandbRun
from tokenenv.cli.config_file import check_run, fields_from, mapping, read_values, write_values
from tokenenv.cli.console import say
from tokenenv.config import EnvConfig
from tokenenv.errors import InvalidArgument, check_choice
from tokenenv.parts import load_task
from tokenenv.registration import TASKS
from tokenenv.shown import without_secrets
from tokenenv.values import fit
from tokenenv.vector_env import TokenVectorEnv

if TYPE_CHECKING:
    Algorithm = str
else:
    Algorithm = Literal[tuple(ALGORITHMS)]
Config = TypeVar("Config", bound=AgentConfig)
GROUP_SIZE = 4
"""Of envs for group methods, where --options does not say."""
NOT_SAVED = ("config", "resume", "run_dir", "track")
"""Fields that say where one run comes from and goes to, not what it is."""


@dataclass(kw_only=True)
class Train(Generic[Config]):
    """Train an agent. The run folder gets its config, TensorBoard events, checkpoints and every episode as JSON.

    The agent options shown are those of the algorithm: `tokenenv train --algo grpo --help`.
    """

    config: Path | None = None
    """A run's config.yaml to start from; other flags override it."""
    resume: Path | None = None
    """A run folder to go on with from its checkpoint; no other flags but --total-tokens and --track then count."""
    env: str = "tokenenv/Reviews-v0"
    """A registered id; `tokenenv envs` lists them."""
    num_envs: int = 64
    """Texts that run side by side."""
    reward: str | None = None
    """A reward design; `tokenenv rewards` lists them; by default the env's own."""
    options: dict[str, str] = field(default_factory=dict)
    """Further options of the env and its task: --options max_new_tokens 64 model path/to/model prompts prompts.jsonl"""
    algo: Algorithm = "ppo"
    """The algorithm; docs/algorithms.md compares them."""
    agent: Config = field(default_factory=lambda: cast(Config, PPOConfig()))
    """Its settings."""
    total_tokens: int = 200_000
    """Tokens to emit in all."""
    checkpoint_every: int = 10
    """Updates between checkpoints; the last update always writes one."""
    run_dir: Path | None = None
    """The run folder; by default runs/ENV-ALGO-SEED-TIME."""
    track: Literal["wandb"] | None = None
    """Also log to Weights & Biases (pip install 'tokenenv-rl[wandb]')."""

    def __post_init__(self) -> None:
        expected = ALGORITHMS[self.algo].config_class
        if type(self.agent) is not expected:
            raise InvalidArgument(f"agent= is no {expected.__name__}, which algo={self.algo!r} takes.")
        for name in ("num_envs", "total_tokens", "checkpoint_every"):
            check_count(name, getattr(self, name))

    def run(self) -> None:
        """Trains, and says where the run folder is."""
        folder = self.resume or self.run_dir or default_run_dir(self)
        if self.resume is not None:
            made = load_config(folder / "config.yaml", self.said())
            made.options, made.agent = made.options | self.options, with_rollout(made.agent, self.agent)
            kept = {"total_tokens": max(self.total_tokens, made.total_tokens), "resume": self.resume, "track": self.track}
            self.__dict__.update({**vars(made), **kept})
        # First of all, so that a missing package leaves no folder behind.
        wandb = self.make_wandb(folder) if self.track == "wandb" else None
        agent, checkpoint = self.make_agent(folder), folder / "checkpoint"

        def on_update(metrics: dict[str, float], episodes: Sequence[Episode]) -> None:
            if wandb is not None:
                wandb(metrics, episodes)
            if agent.updates % self.checkpoint_every == 0:
                agent.save(checkpoint)

        agent.learn(self.total_tokens, progress=True, on_update=on_update)
        agent.save(checkpoint)
        if wandb is not None:
            wandb.close()
        looks = (f"tokenenv show {folder}", f"tokenenv evaluate {folder}", f"tensorboard --logdir {folder}")
        say(f"run folder: {folder}; look at it:", *looks)

    def make_agent(self, folder: Path) -> Agent:
        """A new agent, and its config in the run folder; or the one whose checkpoint is there."""
        algorithm = ALGORITHMS[self.algo]
        if self.resume is not None:
            rollout = {"rollout": self.agent.rollout, "rollout_options": self.agent.rollout_options}
            return algorithm.load(folder / "checkpoint", self.make_envs(), run_dir=folder, **rollout)
        agent = algorithm(self.make_envs(), self.agent, run_dir=folder)
        save_config(self, folder / "config.yaml")
        return agent

    def make_wandb(self, folder: Path) -> WandbRun:
        """The run at Weights & Biases, which records the command line too: no key may stand there."""
        values = dataclasses.asdict(self)
        if without_secrets(values) != values:
            raise InvalidArgument("track='wandb' records the command line, which holds a key: give it as VLLM_API_KEY instead.")
        return WandbRun(folder, values)

    def said(self) -> set[str]:
        """What the flags of a run that goes on say of what a file may not (`tokenenv.trust`), by name."""
        names = {f"options.{key}" for key in self.options}
        names |= {f"agent.rollout_options.{key}" for key in self.agent.rollout_options}
        return names | ({"agent.rollout"} if self.agent.rollout != "step" else set())

    def make_envs(self, **changes: Any) -> TokenVectorEnv:
        """The run's envs; `changes` override its options."""
        check_choice("env", self.env, TASKS)
        options = option_values(self.env, self.options)
        given: dict[str, Any] = {"reward": self.reward, "autoreset_mode": "SameStep"}
        if ALGORITHMS[self.algo].grouped:
            given["group_size"] = GROUP_SIZE
        envs = gym.make_vec(self.env, num_envs=self.num_envs, **{**given, **options, **changes})
        return cast(TokenVectorEnv, envs)


def save_config(config: Train, path: Path) -> None:
    """Writes what reruns a run: `tokenenv train --config PATH`. Keys and passwords are left out."""
    write_values(path, {key: value for key, value in dataclasses.asdict(config).items() if key not in NOT_SAVED})


def load_config(path: Path, said: Collection[str] = ()) -> Train:
    """Reads a config that `save_config` wrote.

    A file is data (`tokenenv.trust`): `said` names what the command line says too, such as "options.reward_model".
    Raises `InvalidArgument` naming the file, and the field that is unknown, missing, of another type or not allowed.
    """
    values = fields_from(Train, read_values(path), path, NOT_SAVED)
    check_choice(f"{path}: env", values["env"], TASKS)
    check_choice(f"{path}: algo", values["algo"], ALGORITHMS)
    config_class = ALGORITHMS[values["algo"]].config_class
    values["agent"] = fields_from(config_class, mapping(values["agent"], path, "agent"), path)
    check_run(values, path, said)
    try:
        return Train(**{**values, "agent": config_class(**values["agent"])})
    except InvalidArgument as error:
        raise InvalidArgument(f"{path}: {error}") from error


def option_values(env_id: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as they were typed, as the env or its task wants them: `kl_coef` "1e-3" is a number, `model` "1e-3" a folder."""
    wanted = typing.get_type_hints(EnvConfig) | typing.get_type_hints(load_task(str(options.get("task", TASKS[env_id]))))
    wanted = {key: hint for key, hint in wanted.items() if key != "return"} | {"task": str}
    for key in options:
        check_choice("option", key, wanted)
    return {key: fit(key, value, wanted[key]) for key, value in options.items()}


def with_rollout(agent: Config, said: AgentConfig) -> Config:
    """An agent's config, with what the command line says of what writes the texts."""
    rollout = agent.rollout if said.rollout == "step" else said.rollout
    return dataclasses.replace(agent, rollout=rollout, rollout_options=agent.rollout_options | said.rollout_options)


def check_count(name: str, value: int, least: int = 1) -> None:
    """Raises `InvalidArgument` for a number that counts nothing."""
    if value < least:
        raise InvalidArgument(f"{name}={value} must be a whole number, {least} or more.")


def default_run_dir(config: Train) -> Path:
    """runs/ENV-ALGO-SEED-TIME."""
    name = config.env.split("/")[-1].lower()
    return Path("runs") / f"{name}-{config.algo}-{config.agent.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
