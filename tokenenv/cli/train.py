"""`tokenenv train`, and the config that its run folders hold."""

import dataclasses
import inspect
import sys
import time
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar, cast

import gymnasium as gym
import tyro

from tokenenv import ranks
from tokenenv.agents import ALGORITHM_NAMES, Agent, AgentConfig, PPOConfig
from tokenenv.agents.config import learning_rate
from tokenenv.agents.run.files import locked, new_folder, no_trace, previous_of, refuse_run
from tokenenv.agents.run.run_config import made_with, write_values
from tokenenv.agents.run.tracking import WandbRun, import_wandb
from tokenenv.cli.config_file import (
    agent_entries,
    check_names,
    check_rollout,
    env_entries,
    fields_from,
    fitting,
    mapping,
    named_again,
    read_values,
)
from tokenenv.cli.console import say, say_on_stderr
from tokenenv.cli.help import OPTIONS, PATH, shown_as
from tokenenv.cli.names import algorithm_of, env_id_of, gold_of, make_importable, reward_of
from tokenenv.cli.signals import stopping
from tokenenv.env.as_typed import resolved
from tokenenv.env.build import load_task
from tokenenv.env.config import EnvConfig
from tokenenv.env.vector_env import TokenVectorEnv
from tokenenv.errors import InvalidArgument, check_choice
from tokenenv.registration import ENV_NAMES, task_source
from tokenenv.rewards.designs import DESIGN_NAMES
from tokenenv.safety.shown import without_secrets
from tokenenv.safety.trust import repeated
from tokenenv.safety.values import fit
from tokenenv.tables import read_rows

Config = TypeVar("Config", bound=AgentConfig)
ENV = tyro.conf.arg(
    metavar="ID|MODULE:ID",
    help="What is to be learned: an id that `tokenenv envs` lists, or module:id, where importing "
    f"your module registers the id.{ENV_NAMES.added()}",
)
REWARD = shown_as(
    "NAME|MODULE:NAME|{MAPPING}",
    "What is paid: a design that `tokenenv rewards` lists; module:Name, a function of (prompt, "
    "response) or a RewardTerm in your module.py; or a mixture such as '{dense: [token, 0.3], end: "
    f"terminal}}'. By default the env's own.{DESIGN_NAMES.added()}",
)
GOLD = shown_as(
    "MODULE:FUNCTION",
    "What you really want: a function of (prompt, response) that is reported beside the reward and "
    "never paid. For envs with the option gold, such as tokenenv/TextGen-v0.",
)
EVAL_PROMPTS = shown_as(
    "FILE",
    "Prompts that `tokenenv evaluate` asks for later and training does not: a file that is read as "
    "the option prompts is, by the same prompt_column and chat_template.",
)
ALGO = tyro.conf.arg(
    metavar="NAME|MODULE:NAME",
    help=f"The algorithm: {', '.join(ALGORITHM_NAMES.bundled)}; or module:Name, an Agent in your "
    f"module. docs/algorithms.md compares them.{ALGORITHM_NAMES.added()}",
)
"""How `--help` shows the fields that are names: with those that installed plugins add."""
GROUP_SIZE = 4
"""Of envs for group methods, where --options does not say."""
MAY_CHANGE = ("rollout", "rollout_options", "max_batch_tokens")
"""The agent's settings that a run may go on with others of: who writes the texts, and memory."""
NOT_SAVED = ("config", "resume", "run_dir", "track")
"""Fields that say where one run comes from and goes to, not what it is."""


@dataclass(kw_only=True)
class Train(Generic[Config]):
    """Train an agent. Everything about the run goes into its run folder: config, TensorBoard
    events, checkpoints, and every text with its rewards. On several GPUs: torchrun
    --nproc-per-node 4 -m tokenenv.cli train ... (docs/scale.md).

    The agent options are those of the algorithm: `tokenenv train --algo grpo --help` shows GRPO's.
    """

    env: Annotated[str, ENV] = "tokenenv/Reviews-v0"
    reward: Annotated[str | None, REWARD] = None
    gold: Annotated[str | None, GOLD] = None
    eval_prompts: Annotated[str | None, EVAL_PROMPTS] = None
    algo: Annotated[str, ALGO] = "ppo"
    num_envs: int = 64
    """Texts that are written side by side, by all processes where torchrun starts several."""
    total_tokens: int = 200_000
    """Length of the run, in tokens that the policy writes."""
    options: Annotated[dict[str, str], OPTIONS] = field(default_factory=dict)
    """Options of the env, as names and values: --options max_new_tokens 64 model path/to/model
    prompts prompts.jsonl. `tokenenv envs ID` lists those of an id."""
    checkpoint_every: int = 10
    """Updates from one checkpoint to the next; the last update always writes one."""
    run_dir: Annotated[Path | None, PATH] = None
    """The run folder, a new or an empty one; by default runs/ENV-ALGO-SEED-TIME."""
    config: Annotated[Path | None, PATH] = None
    """A run's config.yaml to begin a new run with; other flags override it."""
    resume: Annotated[Path | None, PATH] = None
    """A run folder to go on with from its checkpoint, to the end of that run. --total-tokens makes
    the run longer."""
    track: Annotated[Literal["wandb"] | None, shown_as("wandb")] = None
    """Also log to Weights & Biases (pip install wandb)."""
    agent: Config = field(default_factory=lambda: cast(Config, PPOConfig()))
    """Settings of the algorithm that --algo names."""

    def __post_init__(self) -> None:
        expected = self.algorithm.config_class
        if type(self.agent) is not expected:
            raise InvalidArgument(
                f"agent= is no {expected.__name__}, which algo={self.algo!r} takes."
            )
        for name in ("num_envs", "total_tokens", "checkpoint_every"):
            check_count(name, getattr(self, name))

    @property
    def algorithm(self) -> type[Agent]:
        """The agent's class."""
        return algorithm_of(self.algo)

    def run(self) -> None:
        """Train, and say where the run folder is."""
        if self.track == "wandb":
            self._check_tracking()  # before anything is written
        with ranks.joined():
            if self.resume is None:
                self._begin()
            else:
                self._go_on(self.resume)

    def _check_tracking(self) -> None:
        """Raise where W&B is missing, or would record a key: it records the command line."""
        import_wandb()
        values = dataclasses.asdict(self)
        if without_secrets(values) != values:
            raise InvalidArgument(
                "track='wandb' records the command line, which holds a key: give it as "
                "VLLM_API_KEY instead."
            )

    def _begin(self) -> None:
        if self.run_dir is not None:
            refuse_run(self.run_dir)  # before models are loaded
        self.check_eval_prompts()
        agent = self._new_agent()
        folder = ranks.of_first(lambda: self.run_dir or new_folder(default_run_dir(self)))
        with locked(folder):
            # Another process may have taken it meanwhile.
            ranks.of_first(lambda: refuse_run(folder))
            # A run whose reward returns no number, say, could not be gone on with, and would keep
            # a better one out of its folder.
            with no_trace(folder, lambda: agent.updates == 0):
                self._learn(agent, folder)

    def _go_on(self, folder: Path) -> None:
        if self.config is not None or self.run_dir not in (None, folder):
            raise InvalidArgument(
                f"--resume {folder} takes config and folder from there: leave out --config and "
                f"--run-dir."
            )
        with locked(folder):
            agent = self._resumed_agent(folder)
            self._check_end(
                agent, fit("total_tokens", read_values(folder / "config.yaml")["total_tokens"], int)
            )
            self._learn(agent, folder)

    def _new_agent(self) -> Agent:
        return self.algorithm(self.make_envs(), self.agent)

    def _resumed_agent(self, folder: Path) -> Agent:
        """Return the agent of the folder's checkpoint.

        A flag that contradicts the checkpoint is an error. Those of the agent are compared here,
        and those of the env in `load`.
        """
        checkpoint, episodes = folder / "checkpoint", folder / "episodes.jsonl"
        begun = (
            checkpoint.exists()
            or previous_of(checkpoint).exists()
            or (episodes.exists() and episodes.stat().st_size)
        )
        if not begun:  # stopped before its first checkpoint, so before its first update
            return self._new_agent()
        changes = {name: getattr(self.agent, name) for name in MAY_CHANGE}
        with fitting(folder / "config.yaml"):
            agent = self.algorithm.load(checkpoint, self.make_envs(), run_dir=folder, **changes)
        saved, given = (dataclasses.asdict(config) for config in (agent.config, self.agent))
        if given["lr"] is None:  # which asks for no other rate
            given["lr"] = saved["lr"]
        named = {
            name: (saved[name], value) for name, value in given.items() if saved[name] != value
        }
        differing = [
            f"{name} is {there!r} there and {here!r} here" for name, (there, here) in named.items()
        ]
        if differing:
            raise InvalidArgument(
                f"--resume {folder} goes on with the settings of its checkpoint: "
                f"{'; '.join(differing)}."
            )
        return agent

    def _check_end(self, agent: Agent, planned: int) -> None:
        """Raise where the run would end earlier than its config says, and say what a later end
        changes."""
        total, seen = self.total_tokens, agent.tokens_seen
        if total < planned:
            raise InvalidArgument(
                f"--total-tokens {total} is less than the run's own {planned}: --resume can only "
                f"make it longer."
            )
        if total > planned:
            now, then = (learning_rate(agent.config, seen / end) for end in (total, planned))
            say(
                f"the run was to end at {planned:,} tokens and goes on to {total:,}: from here on "
                f"its learning rate is that of "
                f"a run of {total:,} ({agent.config.lr_schedule}; {now:.3g} at {seen:,} tokens, "
                f"where it was {then:.3g})"
            )
        elif seen >= total:
            say(f"the run has ended at {seen:,} tokens; --total-tokens makes it longer")

    def _learn(self, agent: Agent, folder: Path) -> None:
        agent.run_dir, agent.run_config = folder, self.as_run(agent).saved()
        tracked = self.track == "wandb" and ranks.number() == 0
        wandb = WandbRun(folder, dataclasses.asdict(self)) if tracked else None
        with stopping(agent.stop) as own:
            agent.learn(
                self.total_tokens,
                progress=True,
                on_update=wandb,
                checkpoint_every=self.checkpoint_every,
            )
        received = [one for part in ranks.gathered(own) for one in part]
        if received:
            say_on_stderr(
                f"stopped by {received[0].name}; saved at {agent.tokens_seen:,} tokens; "
                f"go on with: {command()} train --resume {folder}{self.again()}"
            )
            sys.exit(128 + received[0])
        looks = (
            f"tokenenv show {folder}",
            f"tokenenv evaluate {folder}{self.again('agent.rollout', 'agent.rollout_options')}",
            f"tensorboard --logdir {folder}",
        )
        say(f"run folder: {folder}; look at it:", *looks)

    def again(self, *left_out: str) -> str:
        """The flags, with a space before them, that a command on the run folder has to repeat,
        because a file cannot ask for what they name; `left_out` are entries that the command does
        not take."""
        values = without_secrets(dataclasses.asdict(self))
        entries = env_entries(values) | agent_entries(values)
        flags = repeated(
            {
                name: value
                for name, value in entries.items()
                if not {name, name.rpartition(".")[0]} & set(left_out)
            }
        )
        return f" {flags}" if flags else ""

    def as_run(self, agent: Agent) -> "Train":
        """Return this config with the value of every setting of the agent and of every option of
        the env, defaults included, so that the run can be made again after a default has changed.
        A learning rate that was left open stays open: it follows from what is trained."""
        settings = cast(Config, dataclasses.replace(agent.config, lr=self.agent.lr))
        return dataclasses.replace(
            self, options=self.options | resolved(agent.core), agent=settings
        )

    def saved(self) -> dict[str, Any]:
        """Return what the run folder's config says of this."""
        values = dataclasses.asdict(self)
        return {key: value for key, value in values.items() if key not in NOT_SAVED}

    def check_eval_prompts(self) -> None:
        """Raise where there are no such prompts, or the env takes none: before anything learns."""
        if self.eval_prompts is None:
            return
        known = known_options(env_id_of(self.env), self.options)
        if "prompts" not in known:
            raise InvalidArgument(
                f"--eval-prompts is for envs with the option prompts, which {self.env} has not."
            )
        if not Path(self.eval_prompts).is_file():
            raise InvalidArgument(f"eval_prompts={self.eval_prompts!r} is not a file.")
        if "prompt_column" in known:
            read_rows(self.eval_prompts, self.options.get("prompt_column", "prompt"))

    def make_envs(self, **changes: Any) -> TokenVectorEnv:
        """Make the run's envs; `changes` override its options."""
        num_envs, left = divmod(self.num_envs, ranks.count())
        if left:
            raise InvalidArgument(
                f"--num-envs {self.num_envs} is of all {ranks.count()} processes, and must be a "
                f"multiple of that."
            )
        keywords = self.env_keywords(**changes)
        envs = gym.make_vec(env_id_of(self.env), num_envs=num_envs, **keywords)
        if not isinstance(envs.unwrapped, TokenVectorEnv):
            raise InvalidArgument(
                f"env={self.env!r} makes a {type(envs.unwrapped).__name__}, no TokenVectorEnv."
            )
        return cast(TokenVectorEnv, envs)

    def env_keywords(self, **changes: Any) -> dict[str, Any]:
        """Return the keywords with which the run's envs are made; `changes` override its
        options."""
        defaults: dict[str, Any] = {"autoreset_mode": "SameStep"}
        if self.algorithm.grouped:
            defaults["group_size"] = GROUP_SIZE
        named = {"reward": self.reward, "gold": self.gold}
        return env_keywords(env_id_of(self.env), self.options, named, changes, defaults)


def command() -> str:
    """Return what the commands of this program begin with, where they are run as this one is."""
    if ranks.count() == 1:
        return "tokenenv"
    return f"torchrun --nproc-per-node {ranks.count()} -m tokenenv.cli"


def save_config(config: Train, path: Path, envs: TokenVectorEnv | None = None) -> None:
    """Write the file that makes a run again: `tokenenv train --config PATH`.

    Keys and passwords are left out. With `envs` the file also says what they are, under
    `made_with`, which is a record: nothing is read from it.
    """
    write_values(path, config.saved(), {} if envs is None else made_with(envs))


def load_config(path: Path, said: Collection[str] = (), **names: str | None) -> Train:
    """Read a config that `save_config` wrote.

    A file is data (`tokenenv.safety.trust`).

    Args:
        path: the file.
        said: dotted names of what the command line says too, such as "options.reward_model".
        **names: the `env`, `reward`, `gold`, `algo` or `eval_prompts` that the command line gives.
            It stands in the place of the file's, which then does not matter; only here may a name
            hold a module.

    Raises:
        InvalidArgument: naming the file, and the field that is unknown, missing, of another type
            or not allowed, or the part of a run of Python that has no name.
    """
    read = read_values(path)
    read.pop("made_with", None)
    given = {name: value for name, value in names.items() if value is not None}
    read = named_again(read, path, {*said, *given})
    if "algo" in given and read.get("algo") not in (None, given["algo"]):
        raise InvalidArgument(
            f"--algo {given['algo']} does not fit {path}, which is for {read['algo']}."
        )
    values = fields_from(Train, read | given, path, NOT_SAVED)
    # The names come first: looking up an algorithm by a name with a module imports it.
    check_names(values, path, {*said, *given})
    config_class = algorithm_of(values["algo"]).config_class
    values["agent"] = fields_from(config_class, mapping(values["agent"], path, "agent"), path)
    check_rollout(values, path, said)
    try:
        return Train(**{**values, "agent": config_class(**values["agent"])})
    except InvalidArgument as error:
        raise InvalidArgument(f"{path}: {error}") from error


def env_keywords(
    env_id: str,
    options: Mapping[str, Any],
    named: Mapping[str, str | None],
    changes: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the keywords with which an env is made, from what was typed.

    Args:
        env_id: of the env.
        options: those of `--options`, as texts. They go before `defaults`, and `changes` before
            them.
        named: the names that `--reward` and `--gold` give; None: not given.
    """
    given = {"reward": named["reward"], **(defaults or {}), **option_values(env_id, options)}
    given |= changes or {}
    given["reward"] = reward_of(given["reward"])
    if named["gold"] is not None:
        if "gold" not in known_options(env_id, options):
            raise InvalidArgument(
                f"--gold is for envs with the option gold, which {env_id} has not."
            )
        given["gold"] = gold_of(named["gold"])
    if "watch" in given:
        given["watch"] = reward_of(given["watch"], "watch")
    return given


def option_values(env_id: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options that were typed, each as the type that the env or its task wants: `kl_coef`
    "1e-3" is a number, `model` "1e-3" a folder."""
    wanted = known_options(env_id, options)
    for key in options:
        check_choice("option", key, wanted)
    return {key: fit(key, value, wanted[key]) for key, value in options.items()}


def known_options(env_id: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the type of each option that the env, or the task that `options` name, takes."""
    if "task" in options or "respond" in options:
        make_importable()
    source = options.get("task", task_source(env_id))
    task = load_task(source) if isinstance(source, str) else source
    return typing.get_type_hints(EnvConfig) | parameter_types(task) | {"task": str}


def parameter_types(task: Callable[..., Any]) -> dict[str, Any]:
    """The type of each parameter of a task's function: its annotation, else that of its default,
    else `Any`."""
    try:
        hints = typing.get_type_hints(task)
    except (TypeError, NameError):  # no plain function, or names that only a type checker knows
        hints = {}
    found = {}
    for name, parameter in inspect.signature(task).parameters.items():
        default = parameter.default
        guess = Any if default is None or default is parameter.empty else type(default)
        found[name] = hints.get(name, guess)
    return found


def check_count(name: str, value: int, least: int = 1) -> None:
    """Raise `InvalidArgument` for a number below `least`."""
    if value < least:
        raise InvalidArgument(f"{name}={value} must be a whole number, {least} or more.")


def default_run_dir(config: Train) -> Path:
    """The folder runs/ENV-ALGO-SEED-TIME. A name with a module is shown without its module."""
    # A folder's name holds no colon, which Windows refuses, and no slash.
    env = config.env.rpartition(":")[2].rpartition("/")[2].lower()
    algo = config.algo.rpartition(":")[2].replace("/", "-")
    return Path("runs") / f"{env}-{algo}-{config.agent.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
