"""`tokenenv train`, and the config that its run folders hold."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast

import gymnasium as gym
import yaml

from tokenenv.agents import ALGORITHMS, Agent, AgentConfig, PPOConfig
from tokenenv.agents.episodes import Episode
from tokenenv.agents.tracking import WandbRun
from tokenenv.cli.console import console
from tokenenv.errors import InvalidArgument, check_choice
from tokenenv.registration import TASKS
from tokenenv.vector_env import TokenVectorEnv

if TYPE_CHECKING:
    Algorithm = str
else:
    Algorithm = Literal[tuple(ALGORITHMS)]
Config = TypeVar("Config", bound=AgentConfig)
GROUP_SIZE = 4
"""Of envs for group methods, where --options does not say."""


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
            raise InvalidArgument(f"agent={self.agent!r} is no {expected.__name__}, which algo={self.algo!r} takes.")

    def run(self) -> None:
        """Trains, and says where the run folder is."""
        folder = self.resume or self.run_dir or default_run_dir(self)
        if self.resume is not None:
            made = load_config(folder / "config.yaml")
            kept = {"total_tokens": max(self.total_tokens, made.total_tokens), "resume": self.resume, "track": self.track}
            self.__dict__.update({**vars(made), **kept})
        # First of all, so that a missing package leaves no folder behind.
        wandb = WandbRun(folder, dataclasses.asdict(self)) if self.track == "wandb" else None
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
        console.print(f"run folder: {folder}; look at it:", *looks, sep="\n  ", soft_wrap=True)

    def make_agent(self, folder: Path) -> Agent:
        """A new agent, and its config in the run folder; or the one whose checkpoint is there."""
        algorithm = ALGORITHMS[self.algo]
        if self.resume is not None:
            return algorithm.load(folder / "checkpoint", self.make_envs(), run_dir=folder)
        agent = algorithm(self.make_envs(), self.agent, run_dir=folder)
        save_config(self, folder / "config.yaml")
        return agent

    def make_envs(self, **changes: Any) -> TokenVectorEnv:
        """The run's envs; `changes` override its options."""
        check_choice("env", self.env, TASKS)
        options: dict[str, Any] = {key: yaml.safe_load(str(value)) for key, value in self.options.items()}
        given: dict[str, Any] = {"reward": self.reward, "autoreset_mode": "SameStep"}
        if ALGORITHMS[self.algo].grouped:
            given["group_size"] = GROUP_SIZE
        envs = gym.make_vec(self.env, num_envs=self.num_envs, **{**given, **options, **changes})
        return cast(TokenVectorEnv, envs)


def save_config(config: Train, path: Path) -> None:
    """Writes what reruns a run: `tokenenv train --config PATH`."""
    values = dataclasses.asdict(config)
    for key in ("config", "resume", "run_dir", "track"):
        del values[key]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def load_config(path: Path) -> Train:
    """Reads a config that `save_config` wrote."""
    if not path.is_file():
        raise InvalidArgument(f"config={str(path)!r} is not a file; a run folder holds a config.yaml.")
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise InvalidArgument(f"config={str(path)!r} holds no mapping of options.")
    algo = values.setdefault("algo", "ppo")
    check_choice(f"{path}: algo", algo, ALGORITHMS)
    agent = _from_mapping(ALGORITHMS[algo].config_class, values.pop("agent", {}), path)
    return _from_mapping(Train, {**values, "agent": agent}, path)


def default_run_dir(config: Train) -> Path:
    """runs/ENV-ALGO-SEED-TIME."""
    name = config.env.split("/")[-1].lower()
    return Path("runs") / f"{name}-{config.algo}-{config.agent.seed}-{time.strftime('%Y%m%d-%H%M%S')}"


def _from_mapping(cls: type, values: Mapping[str, Any], path: Path) -> Any:
    names = {one.name for one in dataclasses.fields(cls)}
    for key in values:
        check_choice(f"{path}: the field", key, names)
    return cls(**values)
