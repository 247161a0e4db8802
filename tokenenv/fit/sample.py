"""Data for `tokenenv fit` from an environment: texts of the reference or of a policy, compared by
the environment's gold score or by its score."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv

from tokenenv.agents.config import AgentConfig, check_seed
from tokenenv.agents.episodes import Episode
from tokenenv.agents.learning.policy import LMPolicy
from tokenenv.agents.rollout.actor import Actor
from tokenenv.agents.rollout.collector import Collector
from tokenenv.agents.rollout.env_rows import env_core, take_info, take_obs
from tokenenv.agents.rollout.generate import check_temperature
from tokenenv.agents.rollout.make import default_policy
from tokenenv.agents.rollout.requirements import check_env, check_policy
from tokenenv.agents.run.evaluate import text_of_each
from tokenenv.agents.run.load_policy import load_policy
from tokenenv.errors import InvalidArgument, check_choice
from tokenenv.fit.continuations import check, plain, prefix_values
from tokenenv.fit.sample_rows import Row, Rows, ranked, text_of, value_columns
from tokenenv.models.loading import check_same_tokens, load_causal_lm, load_tokenizer
from tokenenv.tables import Columns

KINDS = ("ranking", "scores", "values", "texts")


@dataclass(kw_only=True, slots=True)
class SampleConfig:
    """What is sampled from an environment."""

    kind: Literal["ranking", "scores", "values", "texts"] = "ranking"
    """"ranking": texts of one prompt, the best first; two of them are a pair. "scores": texts with
    a score. "values": texts with a score and the value of every prefix, from continuations.
    "texts": texts alone."""
    num_examples: int = 1024
    """Rankings, or texts, 1 or more."""
    by: Literal["gold", "score"] = "gold"
    """What texts are compared by: the task's true metric, or the environment's own score."""
    texts_per_prompt: int | None = None
    """Texts of each prompt, 1 or more, and for a ranking 2 or more. By default the fewest."""
    temperature: float = 1.0
    """Temperature of the sampling, 0 or more."""
    noise: float = 0.0
    """Above 0 rankings are drawn, as people's are: a text is better with probability
    sigmoid(difference / noise) (Bradley-Terry; of more than two texts, Plackett-Luce). 0 ranks by
    the score itself."""
    continuations: int = 16
    """Continuations by the reference of each prefix, for "values"; 2 to the number of slots."""
    every: int = 1
    """Tokens from one value to the next, for "values"; the prompt and the whole text have one too.
    The tokens between have none."""
    beta: float | None = None
    """Reward per nat, above 0, for "values": a value is then beta log mean exp(score / beta), which
    estimates V* of score - beta KL. By default it is the mean score."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        check_choice("by", self.by, ("gold", "score"))
        check_temperature(self.temperature)
        check_seed(self.seed)
        least = 2 if self.kind == "ranking" else 1
        if self.texts_per_prompt is None:
            self.texts_per_prompt = least
        for name, lowest in (("num_examples", 1), ("texts_per_prompt", least)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < lowest:
                raise InvalidArgument(f"{name}={value!r} must be a whole number, {lowest} or more.")
        if not 0 <= self.noise < math.inf:
            raise InvalidArgument(f"noise={self.noise} must be finite and 0 or more.")


@dataclass(slots=True)
class Sampled:
    """What was sampled."""

    rows: list[Row] = field(default_factory=list)
    prompts: int = 0
    """Prompts whose texts were written."""
    ties: int = 0
    """Rankings that were drawn again, because all their texts have the same score."""


def sample(
    envs: VectorEnv | str,
    kind: Literal["ranking", "scores", "values", "texts"],
    num_examples: int,
    *,
    policy: Any = None,
    options: Mapping[str, Any] | None = None,
    num_envs: int = 64,
    on_text: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> list[Row]:
    """Return examples as rows, with the columns that `tokenenv fit` reads.

    Args:
        envs: an env, which is reset; or the id of one, which is made with `num_envs` slots and
            `options`.
        policy: what writes the texts, an agent or a policy; None: the reference.
        on_text: is called with the examples that there are, and those that there will be.
        **settings: the fields of `SampleConfig`.

    Raises:
        InvalidArgument: an argument is not allowed, the env gives no such score, or nearly all of
            its texts have the same one.
    """
    if isinstance(envs, str):
        given = {"autoreset_mode": "SameStep"} | dict(options or {})
        envs = gym.make_vec(envs, num_envs=num_envs, **given)
    config = SampleConfig(kind=kind, num_examples=num_examples, **settings)
    found = draw(envs, config, policy=policy, on_text=on_text)
    return add_values(envs, found.rows, config) if kind == "values" else found.rows


def draw(
    envs: VectorEnv,
    config: SampleConfig,
    *,
    policy: Any = None,
    on_text: Callable[[int, int], None] | None = None,
) -> Sampled:
    """Sample as `sample` does, and return the rows with the counts of what was drawn again. Rows of
    "values" have the scores, and `add_values` adds the values."""
    check_env(envs)
    if config.kind == "values":
        check(envs, config.continuations, config.every, config.beta)
    rng, found = np.random.default_rng(config.seed), Sampled()
    writer = Writer(envs, writing(policy, envs), config)
    rows = Rows(env_core(envs).token_spec, lists=writer.size > 2)
    for group in writer.groups(rng):
        found.prompts += 1
        take(found, group, config, rows, rng)
        if on_text is not None:
            on_text(min(len(found.rows), config.num_examples), config.num_examples)
        if len(found.rows) >= config.num_examples:
            break
        check_goes_on(found, config)
    del found.rows[config.num_examples :]
    return found


def add_values(
    envs: VectorEnv,
    rows: Sequence[Row],
    config: SampleConfig,
    on_text: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Return the rows of texts with a score with the values of their beginnings and the standard
    errors: None where there is none. `on_text` is called with the continuations so far."""
    texts = [text_of(row) for row in rows]
    found = prefix_values(
        envs,
        texts,
        [row["score"] for row in rows],
        columns=[row.get("columns", {}) for row in rows],
        by=config.by,
        continuations=config.continuations,
        every=config.every,
        beta=config.beta,
        seed=config.seed,
        on_text=on_text,
    )
    return [
        row | value_columns(text, values)
        for row, text, values in zip(rows, texts, found, strict=True)
    ]


def writing(policy: Any, envs: VectorEnv) -> Any:
    """Return the policy that writes the texts: that of an agent, of a run folder or its checkpoint,
    or of a language model's folder or hub id; by default the reference.

    Raises:
        InvalidArgument: it has other tokens than the env.
        CheckpointError, ModelError: nothing there can be used.
    """
    if policy is None:
        return default_policy(envs, AgentConfig(), learns=False)
    if isinstance(policy, str | Path):
        run = Path(policy)
        checkpoint = run / "checkpoint" if run.is_dir() else run
        if checkpoint.is_file():
            return load_policy(checkpoint, envs)
        core = env_core(envs)
        model = load_causal_lm(str(policy), argument="policy", device=core.device)
        others = load_tokenizer(str(policy), argument="policy")
        check_same_tokens(core.token_spec.tokenizer, others, "policy")
        policy = LMPolicy(model, frozen=True)
    found = getattr(policy, "policy", policy)
    check_policy(found, envs, learns=False)
    return found


class Writer:
    """Writes texts of the env's own prompts, some of each."""

    def __init__(self, envs: VectorEnv, policy: Any, config: SampleConfig) -> None:
        self.envs, self.size = envs, int(config.texts_per_prompt or 1)
        actor = Actor(policy, temperature=config.temperature, seed=config.seed)
        self.collector = Collector(envs, actor, seed=config.seed)

    def groups(self, rng: np.random.Generator) -> Iterator[list[Episode]]:
        """Yield G texts of one prompt after the other, without an end."""
        at_once = max(1, self.envs.num_envs // self.size)
        while True:
            prompts, columns = self.draw_prompts(at_once, int(rng.integers(2**31)))
            repeated = [prompt for prompt in prompts for _ in range(self.size)]
            rows = [row for row in columns for _ in range(self.size)]
            episodes = text_of_each(self.collector, repeated, rows, lambda ended: None)
            for first in range(0, len(episodes), self.size):
                yield episodes[first : first + self.size]

    def draw_prompts(self, count: int, seed: int) -> tuple[list[np.ndarray], Sequence[Columns]]:
        """Return prompts that the env draws, and what belongs to each."""
        # The collector begins anew afterwards: it must not take these texts for its own.
        self.collector.running = False
        obs, infos = self.envs.reset(seed=seed)
        texts = take_obs(obs, np.arange(count))
        ends = texts["prompt_length"].astype(int)
        prompts = [row[:end] for row, end in zip(texts["tokens"], ends, strict=True)]
        columns = env_core(self.envs).columns
        places = take_info(infos, "prompt_id", np.arange(count), -1)
        return prompts, [columns[place] for place in places] if len(columns) else []


def take(
    found: Sampled,
    group: Sequence[Episode],
    config: SampleConfig,
    rows: Rows,
    rng: np.random.Generator,
) -> None:
    """Add the rows of a prompt's texts, or count why there are none."""
    if config.kind == "texts":
        found.rows += [rows.row(e) for e in group]
        return
    scores = np.array([plain(getattr(e, config.by)) for e in group])
    if np.isnan(scores).any():
        raise InvalidArgument(
            f"by={config.by!r}: the env gives a text no {config.by}; allowed: the other one of "
            f"'gold' and 'score', or kind='texts'."
        )
    if config.kind != "ranking":
        found.rows += [
            rows.row(e) | {"score": score} for e, score in zip(group, scores.tolist(), strict=True)
        ]
    elif (scores == scores[0]).all():
        found.ties += 1
    else:
        order = ranked(scores, config.noise, rng)
        best_first = [group[i] for i in order]
        found.rows.append(rows.ranking(best_first, scores[order].tolist(), config.noise))


def check_goes_on(found: Sampled, config: SampleConfig) -> None:
    """Raise `InvalidArgument` where all but one draw in a thousand or so are ties."""
    if found.ties > 500 + 1000 * len(found.rows):
        raise InvalidArgument(
            f"by={config.by!r}: in {found.ties} of {found.prompts} draws all texts of a prompt "
            f"have the same {config.by}, so hardly anything can be ranked; raise temperature="
            f"{config.temperature} or texts_per_prompt={config.texts_per_prompt}, or let a policy "
            f"write them that has been trained (policy=)."
        )
