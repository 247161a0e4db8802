"""`tokenenv evaluate`: a run's policy beside the reference."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Table
from rich.text import Text

from tokenenv.agents import BestOfN, LMPolicy, Reference, load_policy
from tokenenv.agents.config import check_seed
from tokenenv.agents.run.evaluate import Evaluation, evaluate, next_token_probs
from tokenenv.cli.config_file import fitting
from tokenenv.cli.console import console, counting, say
from tokenenv.cli.envs import task_options
from tokenenv.cli.help import OPTIONS, shown_as
from tokenenv.cli.names import env_id_of
from tokenenv.cli.train import GROUP_SIZE, Train, check_count, load_config
from tokenenv.env.build import load_task
from tokenenv.env.vector_env import TokenVectorEnv
from tokenenv.errors import InvalidArgument
from tokenenv.registration import task_source
from tokenenv.safety.shown import visible
from tokenenv.types import TokenSpec


@dataclass(kw_only=True)
class Evaluate:
    """Compare a run's policy with the reference that it began as, text by text on the same prompts:
    gold, score, KL, length, signs of collapse.

    The prompts are those of --eval-prompts, here or in the run; else the task's held-out ones; else
    those of the training. The table's title says which.
    """

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """A run folder, of `tokenenv train` or of an agent with run_dir= in Python."""
    eval_prompts: Annotated[str | None, shown_as("FILE")] = None
    """Prompts to ask for, a file that is read as the run's own was; by default the run's
    --eval-prompts."""
    num_texts: int = 256
    """Texts that are sampled from each of the two."""
    seed: int = 0
    """Seed of the prompts and of the sampling."""
    examples: int = 3
    """Prompts that are printed with both texts."""
    reward: Annotated[str | None, shown_as("NAME|MODULE:NAME")] = None
    """What the texts are paid here; by default as in the run. It has to be said again where it
    names a module, because a run folder imports nothing."""
    gold: Annotated[str | None, shown_as("MODULE:FUNCTION")] = None
    """What you really want of a text: the run's own --gold, said again, or another one."""
    env: Annotated[str | None, shown_as("MODULE:ID")] = None
    """The run's own --env, to be said again where it names a module."""
    algo: Annotated[str | None, shown_as("MODULE:NAME")] = None
    """The run's own --algo, to be said again where it names a module."""
    options: Annotated[dict[str, str], OPTIONS] = field(default_factory=dict)
    """Options of the env, over those of the run: --options device cuda. Options that run code or
    open a connection are not taken from the run folder. Say them again here: --options
    trust_remote_code true."""

    def run(self) -> None:
        """Print the table and the examples."""
        check_seed(self.seed)
        for name, least in (("num_texts", 1), ("examples", 0)):
            check_count(name, getattr(self, name), least)
        run = self.read()
        options = self.asked(run)
        where = prompts_in_words(run, options)
        envs = replace(run, options=options).make_envs(group_size=1)
        found = {}
        for name, policy_of in {"before": self.reference, "after": self.trained}.items():
            policy = policy_of(run, envs)
            with counting(name) as on_text:
                found[name] = evaluate(
                    policy,
                    envs,
                    num_texts=self.num_texts,
                    temperature=run.agent.temperature,
                    seed=self.seed,
                    best_of=best_of(run) if name == "after" else 1,
                    on_text=on_text,
                )
        console.print(comparison(found, where))
        if envs.oracle is not None:
            say(distance_to_optimum(policy, run.agent.temperature, envs))
        show_examples(found, envs.token_spec, self.examples)

    def read(self) -> Train:
        """Return the run's config, with the names that are said here."""
        # Evaluating steps, so it does not matter what wrote the run's texts, and nobody has to say
        # it again.
        said = {"agent.rollout", "agent.rollout_options.*"}
        said |= {f"options.{name}" for name in self.options}
        said |= {"options.prompts"} if self.eval_prompts is not None else set()
        return load_config(
            self.run_dir / "config.yaml",
            said,
            env=self.env,
            reward=self.reward,
            gold=self.gold,
            algo=self.algo,
            eval_prompts=self.eval_prompts,
        )

    def asked(self, run: Train) -> dict[str, Any]:
        """Return the options of the env that is asked: those of the run, with other prompts."""
        if self.eval_prompts is not None and "prompts" in self.options:
            raise InvalidArgument("--eval-prompts and --options prompts name two sets of prompts.")
        replace(run, options=run.options | self.options).check_eval_prompts()
        held_out = {"prompts": run.eval_prompts} if run.eval_prompts else split_of(run.env)
        options = run.options | held_out | self.options
        prompts_differ = options.get("prompts") != run.options.get("prompts")
        if prompts_differ and "max_prompt_tokens" not in self.options:
            return without_limit(run.env, options)
        return options

    def reference(self, run: Train, envs: TokenVectorEnv) -> LMPolicy:
        """Return the policy that the run began as."""
        settings = {key: getattr(run.agent, key) for key in ("precision", "max_batch_tokens")}
        return Reference(envs, **settings).policy

    def trained(self, run: Train, envs: TokenVectorEnv) -> LMPolicy:
        """Return the run's policy."""
        with fitting(self.run_dir / "config.yaml"):
            return load_policy(self.run_dir / "checkpoint", envs)


def best_of(run: Train) -> int:
    """How many texts the run's algorithm draws for each text."""
    chooses = issubclass(run.algorithm, BestOfN)
    return int(run.options.get("group_size", GROUP_SIZE)) if chooses else 1


def prompts_in_words(run: Train, options: Mapping[str, Any]) -> str:
    """Say which prompts these options ask for, and whether the run was trained on them."""
    for name, words in {
        "prompts": "prompts: {}",
        "split": "prompts: held out by the task (split={})",
    }.items():
        default = parameter_default(run.env, options, name)
        asked = options.get(name, default)
        if asked is not None and asked != run.options.get(name, default):
            return words.format(asked)
    return "prompts: those of the training (none is held out)"


def comparison(found: Mapping[str, Evaluation], title: str = "") -> Table:
    """A table of evaluations side by side, with standard errors.

    A figure that none of them has (the score of a task without a scorer) has no row. The reward's
    terms have one each; the KL term has none, because the KL itself is in the table.
    """
    table = Table("", *found, title=Text(visible(title)), title_justify="left")
    both = found.values()
    rows: dict[str, Callable[[Evaluation], str]] = {
        "texts": lambda e: f"{e.num_texts}",
        "gold": lambda e: f"{e.gold:.3f} ± {e.gold_error:.3f}",
        "score": lambda e: f"{e.score:.3f} ± {e.score_error:.3f}",
        "KL, nats per text": lambda e: f"{e.kl:z.2f}",
        "mean length, tokens": lambda e: f"{e.length:.1f}",
        "turns": lambda e: f"{e.turns:.1f}",
        "tokens that the env wrote": lambda e: f"{e.written:.1f}",
        "distinct bigrams": lambda e: f"{e.distinct_bigrams:.3f}",
    }
    names = {"gold": "gold", "score": "score", "KL, nats per text": "kl"}
    names |= {"turns": "turns", "tokens that the env wrote": "written"}
    for label, name in names.items():
        if all(math.isnan(getattr(evaluation, name)) for evaluation in both):
            del rows[label]
    for label, cell in rows.items():
        table.add_row(label, *map(cell, both))
    for name in dict.fromkeys(name for e in both for name in e.rewards if name != "kl"):
        means = (
            f"{e.rewards.get(name, math.nan):.3f} ± {e.reward_errors.get(name, math.nan):.3f}"
            for e in both
        )
        table.add_row(f"reward: {name}, per text", *means)
    for name in dict.fromkeys(name for evaluation in both for name in evaluation.watched):
        means = (f"{evaluation.watched.get(name, math.nan):.3f}" for evaluation in both)
        table.add_row(f"watch: {name}, per token", *means)
    return table


def distance_to_optimum(policy: LMPolicy, temperature: float, envs: TokenVectorEnv) -> str:
    """A sentence on where a policy stands between the reference and the exact optimum of J = score
    - beta KL."""
    oracle, beta = envs.oracle, 0.0 if envs.config.kl == "none" else envs.kl_coef
    found = oracle.evaluate(next_token_probs(policy, temperature), beta)
    floor, best = oracle.reference_objective(), oracle.optimal_objective(beta)
    share = (found.objective - floor) / (best - floor)
    return (
        f"J = score - {beta} KL: {floor:.3f} of the reference, {found.objective:.3f} ± "
        f"{found.error:.3f} of the run, "
        f"{best:.3f} at the optimum ({share:.0%} of the way)"
    )


def show_examples(found: Mapping[str, Evaluation], spec: TokenSpec, count: int) -> None:
    """Print some prompts, each with the continuation of every evaluation: different prompts as long
    as there are any."""
    texts = list(zip(*(evaluation.episodes for evaluation in found.values()), strict=False))
    first = {tuple(episodes[0].prompt.tolist()): i for i, episodes in reversed([*enumerate(texts)])}
    chosen = sorted(range(len(texts)), key=lambda i: (i not in first.values(), i))
    for episodes in (texts[i] for i in chosen[:count]):
        say("")
        say(prompt_text(episodes[0].prompt.tolist(), spec), style="bold", end="")
        say(" …")
        for name, episode in zip(found, episodes, strict=True):
            figures = {"gold": episode.gold, "score": episode.score}
            known = [f"{what} {value:.1f}" for what, value in figures.items() if value == value]
            figure = f" ({known[0]})" if known else ""
            say(f"  {name}{figure}: {text_of(episode.after_prompt.tolist(), spec.tokenizer)}")


def prompt_text(tokens: list[int], spec: TokenSpec) -> str:
    """The text of a prompt; of a conversation the last message of the user's, without what the
    template writes around it."""
    messages = spec.chats.messages(tokens) if spec.chats is not None else None
    said = [message.get("content") for message in messages or () if message.get("role") == "user"]
    return said[-1] if said and isinstance(said[-1], str) else text_of(tokens, spec.tokenizer)


def text_of(tokens: list[int], tokenizer: Any) -> str:
    """The text of token ids, or the ids where tokens have no text."""
    return str(tokens) if tokenizer is None else tokenizer.decode(tokens, skip_special_tokens=True)


def split_of(env_id: str) -> dict[str, str]:
    """The option that gives a task's held-out prompts, where it has them."""
    return {"split": "test"} if "split" in task_options(task_source(env_id_of(env_id))) else {}


def parameter_default(env_id: str, options: Mapping[str, Any], name: str) -> Any:
    """The value that an option of the task has where it is not given; None where there is none."""
    source = options.get("task", task_source(env_id_of(env_id)))
    task = load_task(source) if isinstance(source, str) else source
    parameter = inspect.signature(task).parameters.get(name)
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


def without_limit(env_id: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options without the run's `max_prompt_tokens`, where the prompts can set it themselves.

    Other prompts may be longer than those of the run, and only they are asked for. Truncated
    prompts keep the run's number, by which they are cut.
    """
    source = options.get("task", task_source(env_id_of(env_id)))
    task = load_task(source) if isinstance(source, str) else source
    limit = inspect.signature(task).parameters.get("max_prompt_tokens")
    if limit is None or limit.default is not None or options.get("long_prompts") == "truncate":
        return dict(options)
    return {key: value for key, value in options.items() if key != "max_prompt_tokens"}
