"""`tokenenv evaluate`: a run's policy beside the reference."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Table

from tokenenv.agents import Agent, Reference
from tokenenv.agents.config import check_seed
from tokenenv.agents.run.evaluate import Evaluation, evaluate, next_token_probs
from tokenenv.cli.config_file import mapping, read_values
from tokenenv.cli.console import console, say
from tokenenv.cli.envs import task_options
from tokenenv.cli.help import OPTIONS, shown_as
from tokenenv.cli.names import env_id_of
from tokenenv.cli.train import check_count, load_config
from tokenenv.env.build import load_task
from tokenenv.env.vector_env import TokenVectorEnv
from tokenenv.registration import task_source

ASKED = ("split", "prompts", "max_prompt_tokens", "long_prompts", "watch")
"""Options that say which texts are asked for, and what is watched in them. The checkpoint belongs
to those of its run."""


@dataclass(kw_only=True)
class Evaluate:
    """Compare a run's policy with the reference on held-out prompts: gold score, KL, length, signs
    of collapse."""

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """A run folder that `tokenenv train` made."""
    num_texts: int = 256
    """Texts that are sampled from each of the two."""
    seed: int = 0
    """Seed of the prompts and of the sampling."""
    examples: int = 3
    """Texts that are printed beside each other."""
    options: Annotated[dict[str, str], OPTIONS] = field(default_factory=dict)
    """Options of the env, over those of the run: --options device cuda prompts held_out.jsonl.
    Options that run code or open a connection are not taken from the run folder. Say them again
    here: --options trust_remote_code true."""
    env: Annotated[str | None, shown_as("MODULE:ID")] = None
    """The run's own --env. It has to be said again where it is module:id, because a run folder
    imports nothing."""
    reward: Annotated[str | None, shown_as("MODULE:NAME")] = None
    """The run's own --reward, to be said again where it names a module."""
    algo: Annotated[str | None, shown_as("MODULE:NAME")] = None
    """The run's own --algo, to be said again where it names a module."""

    def run(self) -> None:
        """Print the table and the examples."""
        check_seed(self.seed)
        for name, least in (("num_texts", 1), ("examples", 0)):
            check_count(name, getattr(self, name), least)
        # Evaluating steps, so it does not matter what wrote the run's texts, and nobody has to say
        # it again.
        said = {
            "agent.rollout",
            "agent.rollout_options.*",
            *(f"options.{key}" for key in self.options if key not in ASKED),
        }
        config = self.run_dir / "config.yaml"
        # The checkpoint is loaded under what the run watched, so only the same words allow it.
        watched = mapping(read_values(config).get("options", {}), config, "options").get("watch")
        if watched is not None and watched == self.options.get("watch"):
            said.add("options.watch")
        made = load_config(config, said, env=self.env, reward=self.reward, algo=self.algo)
        asked = {name: self.options[name] for name in ASKED if name in self.options}
        # The agent is loaded into an env with the run's own prompts, and asked in one with the
        # prompts that were typed. Where the run's file has moved, what was typed stands for both.
        elsewhere = not Path(str(made.options.get("prompts"))).is_file()
        own = {
            name for name in self.options if name not in asked or (name == "prompts" and elsewhere)
        }
        made.options |= {name: self.options[name] for name in own}
        options = made.options | held_out(made.env) | asked
        if "prompts" in asked and "max_prompt_tokens" not in asked:
            options = without_limit(made.env, options)
        envs = replace(made, options=options).make_envs(group_size=1)
        agents = {
            "before": Reference(envs, temperature=made.agent.temperature),
            "after": made.algorithm.load(
                self.run_dir / "checkpoint", made.make_envs(), rollout="step", rollout_options={}
            ),
        }
        found = {
            name: evaluate(agent, envs, num_texts=self.num_texts, seed=self.seed)
            for name, agent in agents.items()
        }
        console.print(comparison(found))
        if envs.oracle is not None:
            say(distance_to_optimum(agents["after"], envs))
        show_examples(found, envs.token_spec.tokenizer, self.examples)


def comparison(found: Mapping[str, Evaluation]) -> Table:
    """A table of evaluations side by side, with standard errors.

    A figure that none of them has (the score of a task without a scorer) has no row. The reward's
    terms have one each; the KL term has none, because the KL itself is in the table.
    """
    table = Table("", *found)
    both = found.values()
    rows: dict[str, Callable[[Evaluation], str]] = {
        "texts": lambda e: f"{e.num_texts}",
        "gold": lambda e: f"{e.gold:.3f} ± {e.gold_error:.3f}",
        "score": lambda e: f"{e.score:.3f} ± {e.score_error:.3f}",
        "KL, nats per text": lambda e: f"{e.kl:z.2f}",
        "mean length, tokens": lambda e: f"{e.length:.1f}",
        "distinct bigrams": lambda e: f"{e.distinct_bigrams:.3f}",
    }
    for label in ("gold", "score"):
        if all(math.isnan(getattr(evaluation, label)) for evaluation in both):
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


def distance_to_optimum(agent: Agent, envs: TokenVectorEnv) -> str:
    """A sentence on where a policy stands between the reference and the exact optimum of J = score
    - beta KL."""
    oracle, beta = envs.oracle, 0.0 if envs.config.kl == "none" else envs.kl_coef
    found = oracle.evaluate(next_token_probs(agent.policy, agent.config.temperature), beta)
    floor, best = oracle.reference_objective(), oracle.optimal_objective(beta)
    share = (found.objective - floor) / (best - floor)
    return (
        f"J = score - {beta} KL: {floor:.3f} of the reference, {found.objective:.3f} ± "
        f"{found.error:.3f} of the run, "
        f"{best:.3f} at the optimum ({share:.0%} of the way)"
    )


def show_examples(found: Mapping[str, Evaluation], tokenizer: Any, count: int) -> None:
    """Print the first prompts, each with the continuation of every evaluation."""
    for episodes in list(
        zip(*(evaluation.episodes for evaluation in found.values()), strict=False)
    )[:count]:
        say("")
        say(text_of(episodes[0].prompt, tokenizer), style="bold", end="")
        say(" …")
        for name, episode in zip(found, episodes, strict=True):
            say(f"  {name} (gold {episode.gold:.1f}): {text_of(episode.response, tokenizer)}")


def text_of(tokens: Any, tokenizer: Any) -> str:
    """The text of token ids, or the ids where tokens have no text."""
    return (
        str(tokens.tolist())
        if tokenizer is None
        else tokenizer.decode(tokens, skip_special_tokens=True)
    )


def held_out(env_id: str) -> dict[str, str]:
    """The option that gives a task's held-out prompts, where it has them."""
    return {"split": "test"} if "split" in task_options(task_source(env_id_of(env_id))) else {}


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
