"""The `tokenenv` command: train, evaluate, show, envs, rewards, version."""

import argparse
import dataclasses
import inspect
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, TypeVar, cast

import gymnasium as gym
import tyro
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from tokenenv import __version__
from tokenenv.agents import ALGORITHMS, Agent, AgentConfig, PPOConfig, Reference
from tokenenv.agents.episodes import Episode
from tokenenv.agents.evaluate import Evaluation, evaluate, next_token_probs
from tokenenv.agents.tracking import WandbRun
from tokenenv.errors import InvalidArgument, TokenEnvError, check_choice
from tokenenv.parts import load_task
from tokenenv.registration import TASKS
from tokenenv.rewards.designs import DESIGNS, make_terms
from tokenenv.show import write_page
from tokenenv.vector_env import TokenVectorEnv

if TYPE_CHECKING:
    Algorithm = str
else:
    Algorithm = Literal[tuple(ALGORITHMS)]
Config = TypeVar("Config", bound=AgentConfig)
GROUP_SIZE = 4
"""Of envs for group methods, where --options does not say."""
console = Console()


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


@dataclass(kw_only=True)
class Evaluate:
    """Compare a run's policy with the reference on held-out prompts: gold score, KL, length, signs of collapse."""

    run_dir: tyro.conf.Positional[Path]
    """A run folder that `tokenenv train` made."""
    num_texts: int = 256
    """Texts to sample from each."""
    seed: int = 0
    """Of the prompts and of the sampling."""
    examples: int = 3
    """Texts to print beside each other."""

    def run(self) -> None:
        """Prints the table and the examples."""
        made = load_config(self.run_dir / "config.yaml")
        envs = made.make_envs(group_size=1, **held_out(made.env))
        agents = {
            "before": Reference(envs, temperature=made.agent.temperature),
            "after": ALGORITHMS[made.algo].load(self.run_dir / "checkpoint", made.make_envs(), rollout="step"),
        }
        found = {name: evaluate(agent, envs, num_texts=self.num_texts, seed=self.seed) for name, agent in agents.items()}
        console.print(comparison(found))
        if envs.oracle is not None:
            console.print(distance_to_optimum(agents["after"], envs))
        show_examples(found, envs.token_spec.tokenizer, self.examples)


@dataclass(kw_only=True)
class Show:
    """Write one page of a run's episodes, to open in a browser: every token coloured by reward, KL, value or advantage."""

    run_dir: tyro.conf.Positional[Path]
    """A run folder that `tokenenv train` made, finished or not."""
    output: Path | None = None
    """Where the page goes; by default episodes.html in the run folder."""
    max_episodes: int = 200
    """Episodes on the page, evenly over the run."""

    def run(self) -> None:
        """Writes the page and says where it is."""
        path = write_page(self.run_dir, self.output, self.max_episodes)
        console.print(f"open {path} in a browser", soft_wrap=True)


@dataclass(kw_only=True)
class Envs:
    """List the registered ids."""

    def run(self) -> None:
        """Prints the table."""
        table = Table(Column("id", min_width=max(map(len, TASKS))), "what", "options of its own")
        for env_id, source in sorted(TASKS.items()):
            table.add_row(env_id, first_line(source), ", ".join(task_options(source)))
        console.print(table)
        console.print("options of every env: the fields of tokenenv.config.EnvConfig")


@dataclass(kw_only=True)
class Rewards:
    """List the reward designs: when they pay, what they need, what they preserve (docs/rewards.md explains each)."""

    def run(self) -> None:
        """Prints the table."""
        table = Table("name", "kind", "needs", "keeps return", "keeps gradient")
        for name in DESIGNS:
            terms = list(make_terms(name).values())
            needs = sorted({need for term in terms for need in term.needs})
            kept = all(term.preserves_return for term in terms), all(term.preserves_gradient for term in terms)
            answers = ("yes" if each else "no" for each in kept)
            table.add_row(name, terms[-1].kind, ", ".join(needs), *answers)
        console.print(table)


@dataclass(kw_only=True)
class Version:
    """Print the version."""

    def run(self) -> None:
        """Prints the version."""
        console.print(__version__)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; an error of ours is one line, without a traceback."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        default = _train_default(args)
        train: Any = train_type(default.algo)
        commands: Any = (
            Annotated[train, tyro.conf.subcommand("train", default=default)]
            | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
            | Annotated[Show, tyro.conf.subcommand("show")]
            | Annotated[Envs, tyro.conf.subcommand("envs")]
            | Annotated[Rewards, tyro.conf.subcommand("rewards")]
            | Annotated[Version, tyro.conf.subcommand("version")]
        )
        command: Any = tyro.cli(commands, args=args, prog="tokenenv", description=__doc__)
        command.run()
    except TokenEnvError as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", highlight=False)
        sys.exit(2)


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


def train_type(algo: str) -> Any:
    """`Train` with the settings of one algorithm, which tyro shows."""
    return Train[ALGORITHMS[algo].config_class]  # type: ignore[misc]


def comparison(found: Mapping[str, Evaluation]) -> Table:
    """Evaluations side by side, with standard errors."""
    table = Table("", *found)
    rows: dict[str, Callable[[Evaluation], str]] = {
        "texts": lambda e: f"{e.num_texts}",
        "gold": lambda e: f"{e.gold:.3f} ± {e.gold_error:.3f}",
        "score": lambda e: f"{e.score:.3f} ± {e.score_error:.3f}",
        "KL, nats per text": lambda e: f"{e.kl:.2f}",
        "mean length, tokens": lambda e: f"{e.length:.1f}",
        "distinct bigrams": lambda e: f"{e.distinct_bigrams:.3f}",
    }
    for label, cell in rows.items():
        table.add_row(label, *map(cell, found.values()))
    return table


def distance_to_optimum(agent: Agent, envs: TokenVectorEnv) -> str:
    """Where a policy stands between the reference and the exact optimum of J = score - beta KL."""
    oracle, beta = envs.oracle, 0.0 if envs.config.kl == "none" else envs.kl_coef
    found = oracle.evaluate(next_token_probs(agent.policy, agent.config.temperature), beta)
    floor, best = oracle.reference_objective(), oracle.optimal_objective(beta)
    share = (found.objective - floor) / (best - floor)
    return (
        f"J = score - {beta} KL: {floor:.3f} of the reference, {found.objective:.3f} ± {found.error:.3f} of the run, "
        f"{best:.3f} at the optimum ({share:.0%} of the way)"
    )


def show_examples(found: Mapping[str, Evaluation], tokenizer: Any, count: int) -> None:
    """Prints the first prompts with each evaluation's continuation."""
    for episodes in list(zip(*(evaluation.episodes for evaluation in found.values()), strict=False))[:count]:
        console.print(f"\n[bold]{tokenizer.decode(episodes[0].prompt, skip_special_tokens=True)}[/bold] …")
        for name, episode in zip(found, episodes, strict=True):
            text = tokenizer.decode(episode.response, skip_special_tokens=True)
            console.print(f"  {name} (gold {episode.gold:.1f}): {text}", markup=False, highlight=False)


def held_out(env_id: str) -> dict[str, str]:
    """The option that gives a task's held-out prompts, where it has them."""
    return {"split": "test"} if "split" in task_options(TASKS[env_id]) else {}


def task_options(source: str) -> list[str]:
    """The names of a task's own options."""
    return list(inspect.signature(load_task(source)).parameters)


def first_line(source: str) -> str:
    """What a task's file says it is."""
    module = inspect.getmodule(load_task(source))
    return (inspect.getdoc(module) or "").split("\n", 1)[0].split(": ", 1)[-1]


def default_run_dir(config: Train) -> Path:
    """runs/ENV-ALGO-SEED-TIME."""
    name = config.env.split("/")[-1].lower()
    return Path("runs") / f"{name}-{config.algo}-{config.agent.seed}-{time.strftime('%Y%m%d-%H%M%S')}"


def _train_default(args: Sequence[str]) -> Train:
    """`--config PATH` sets the defaults that the other flags override; `--algo NAME` says which settings there are."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--algo")
    given = parser.parse_known_args(args)[0]
    made = Train() if given.config is None else load_config(given.config)
    if given.algo in (None, made.algo) or given.algo not in ALGORITHMS:
        return made
    if given.config is not None:
        raise InvalidArgument(f"--algo {given.algo} does not fit --config {given.config}, which is for {made.algo}.")
    return Train(algo=given.algo, agent=ALGORITHMS[given.algo].config_class())


def _from_mapping(cls: type, values: Mapping[str, Any], path: Path) -> Any:
    names = {one.name for one in dataclasses.fields(cls)}
    for key in values:
        check_choice(f"{path}: the field", key, names)
    return cls(**values)


if __name__ == "__main__":
    main()
