"""Measuring a policy on an env: the true metric with its standard error, the KL that it cost, and
signs of collapse."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from tokenenv.agents.episodes import (
    Episode,
    mean_of,
    term_names,
    term_sums,
    turn_summary,
    watched_names,
    watched_tokens,
)
from tokenenv.agents.rollout.actor import Actor, Policy
from tokenenv.agents.rollout.collector import Collector
from tokenenv.agents.rollout.env_rows import learning_undone, responds
from tokenenv.agents.rollout.generate import check_temperature
from tokenenv.agents.rollout.requirements import check_env
from tokenenv.errors import InvalidArgument
from tokenenv.models.batching import last_states
from tokenenv.tables import Columns, read_columns


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What `evaluate` found: means over the texts, NaN where the env gives no such number."""

    num_texts: int
    gold: float
    """The task's true metric."""
    gold_error: float
    """Its standard error."""
    score: float
    """The env's sequence score."""
    score_error: float
    """Its standard error."""
    kl: float
    """log pi - log pi_ref summed over a text, in nats."""
    length: float
    """Response tokens."""
    terminated: float
    """Share of texts that ended by themselves."""
    distinct_bigrams: float
    """Share of different bigrams among all bigrams of the responses; low when texts repeat
    themselves or one another."""
    episodes: tuple[Episode, ...] = field(repr=False)
    """The texts themselves, in the order of their prompts."""
    watched: Mapping[str, float] = field(default_factory=dict)
    """Means per response token of the numbers that the env watches (`watch=`), by name."""
    rewards: Mapping[str, float] = field(default_factory=dict)
    """Means per text of what each term of the reward paid, weighted, by name."""
    reward_errors: Mapping[str, float] = field(default_factory=dict)
    """Their standard errors."""
    turns: float = float("nan")
    """Turns of the policy's per text, where the env writes into texts; else NaN."""
    written: float = float("nan")
    """Tokens that the env wrote into a text; NaN where it never does."""


def evaluate(
    agent: Any,
    envs: VectorEnv,
    *,
    num_texts: int = 256,
    prompts: Sequence[Any] | None = None,
    columns: Mapping[str, Sequence[Any]] | None = None,
    temperature: float | None = None,
    seed: int = 0,
    best_of: int | None = None,
    on_text: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Sample texts from an agent, or from a policy, and return their figures.

    The sampling has caches and random numbers of its own, so the agent is as it was afterwards, but
    for texts that it had begun in this env. The env's terms learn nothing from it, and schedules do
    not go on. A `BestOfN` agent draws n texts for each text, and its KL is the bound that it
    reports.

    Args:
        envs: is reset, so it should not be the env in which an agent is learning.
        num_texts: texts from the env's own prompts, the same prompts for the same `seed`.
        prompts: one text each, in place of `num_texts`.
        columns: what belongs to these prompts, where the reward or `gold` asks for it: a list of
            one value a prompt, by name.
        temperature: by default the agent's (a policy's is 1). 0 takes the likeliest token each
            time, and the KL is then that of this deterministic policy.
        best_of: how many texts are drawn for each text, of which the one with the highest score
            counts; by default the agent's, which is 1 but for `BestOfN`.
        on_text: is called with the texts that have been written and those that will be, after each
            step that ended one.

    Raises:
        InvalidArgument: an argument is not allowed, or the best text is asked for where the env
            gives no score.
    """
    check_env(envs)
    if num_texts < 1 or (prompts is not None and len(prompts) == 0):
        raise InvalidArgument(
            f"num_texts={num_texts} and prompts={prompts} leave nothing to evaluate."
        )
    policy: Policy = getattr(agent, "policy", agent)
    if temperature is None:
        temperature = agent.config.temperature if policy is not agent else 1.0
    check_temperature(temperature)
    best_of = getattr(agent, "best_of", 1) if best_of is None else best_of
    if columns is not None and prompts is None:
        raise InvalidArgument("columns= belong to prompts=, which are missing.")
    rows = read_columns(columns, range(len(prompts or ())), len(prompts or ()), "columns")
    asked = best_of * (num_texts if prompts is None else len(prompts))
    written = 0

    def count(episodes: int) -> None:
        nonlocal written
        written = min(written + episodes, asked)
        if on_text is not None:
            on_text(written, asked)

    draws: list[list[Episode]] = []
    for draw in range(seed * best_of, (seed + 1) * best_of):
        actor = Actor(policy, temperature=temperature, seed=draw)
        with learning_undone(envs):
            if prompts is None:
                # Each draw goes through all prompts: the same seed of the env gives the same again.
                found = first_texts(Collector(envs, actor, seed=seed), num_texts, count)
            else:
                found = text_of_each(Collector(envs, actor, seed=draw), prompts, rows, count)
        draws.append(found)
        check_scores([e.score for e in found], best_of)  # before more are written in vain
        if responds(envs) and prompts is None:
            # What an env writes is drawn by its seed too, and anew for each text of a prompt.
            prompts, rows = [e.prompt for e in found], [e.columns for e in found]
    drawn = [episode for candidates in zip(*draws, strict=True) for episode in candidates]
    chosen = [drawn[i] for i in best_of_each([e.score for e in drawn], best_of)]
    evaluation = summarise(chosen, best_of_n_kl(best_of))
    if not responds(envs):
        return evaluation
    turns = turn_summary(chosen)
    return replace(evaluation, turns=turns["episode/turns"], written=turns["episode/written"])


def text_of_each(
    collector: Collector,
    prompts: Sequence[Any],
    columns: Sequence[Columns],
    count: Callable[[int], None],
) -> list[Episode]:
    """Return one text of each prompt; `columns` are what belongs to each. `count` is called with
    how many have ended in a step, those of slots that are left over included."""
    episodes, num_envs = [], collector.envs.num_envs

    def filled(values: Sequence[Any]) -> list[Any]:
        return [*values, *[values[0]] * (num_envs - len(values))]

    for start in range(0, len(prompts), num_envs):
        group = prompts[start : start + num_envs]
        rows = filled(columns[start : start + num_envs]) if columns else []
        collector.reset({"prompts": filled(group)}, rows)
        episodes += first_texts(collector, num_envs, count)[: len(group)]
    return episodes


def check_scores(scores: Any, n: int) -> None:
    """Raise `InvalidArgument` where the best of n > 1 texts is asked for, and one has no score."""
    if n > 1 and (scores is None or np.isnan(scores).any()):
        raise InvalidArgument(
            f"the best of {n} texts is the one with the highest score, and this env gives a text "
            f"no score: make it with reward_model=, or with a single rule as reward=."
        )


def best_of_each(scores: Any, n: int) -> list[int]:
    """Return the place of the highest score of every n. Raise `InvalidArgument` where n is above 1
    and a text has no score."""
    if n == 1:
        return list(range(len(scores)))
    check_scores(scores, n)
    best_G = np.reshape(scores, (-1, n)).argmax(axis=1)
    return [n * group + int(best) for group, best in enumerate(best_G)]


def best_of_n_kl(n: int) -> float:
    """Return the bound on KL(best of n || one), in nats: log n - (n - 1) / n (Beirami et al. 2024,
    arXiv 2401.01879)."""
    return float(np.log(n)) - (n - 1) / n


def first_texts(
    collector: Collector, num_texts: int, count: Callable[[int], None] = lambda episodes: None
) -> list[Episode]:
    """Return the first texts of each slot, as many from each: taking whatever ends first would
    favour short ones. `count` is called with the number of those that have ended in a step."""
    num_envs = collector.envs.num_envs
    rounds = -(-num_texts // num_envs)
    found: dict[tuple[int, int], Episode] = {}
    first = collector.finished.copy()
    while len(found) < rounds * num_envs:
        before = len(found)
        for episode in collector.step():
            index = episode.index - int(first[episode.slot])
            if index < rounds:
                found[index, episode.slot] = episode
        if len(found) > before:
            count(len(found) - before)
    return [found[key] for key in sorted(found)][:num_texts]


def next_token_probs(
    policy: Any, temperature: float = 1.0
) -> Callable[[Mapping[str, np.ndarray]], np.ndarray]:
    """Return pi(. | text) of an `LMPolicy` as a function of a NumPy observation of K texts.

    The function returns (K, V) float64, as an env's exact `oracle.evaluate` asks for. It reads the
    texts from their start in every call.
    """

    @torch.no_grad()
    def probs(obs: Mapping[str, np.ndarray]) -> np.ndarray:
        lengths = np.asarray(obs["length"])
        tokens_KL = torch.as_tensor(obs["tokens"][:, : lengths.max()], device=policy.device)
        logits_KV = policy.head(last_states(policy.lm_states(tokens_KL, lengths), lengths))
        return (logits_KV.double() / temperature).softmax(-1).cpu().numpy()

    return probs


def summarise(episodes: Sequence[Episode], extra_kl: float = 0.0) -> Evaluation:
    """Return the figures of an evaluation from its episodes; `extra_kl` nats are what choosing
    among texts adds."""
    gold, score = [e.gold for e in episodes], [e.score for e in episodes]
    sums = {name: term_sums(episodes, name) for name in term_names(episodes)}
    return Evaluation(
        num_texts=len(episodes),
        gold=mean_of(gold),
        gold_error=standard_error(gold),
        score=mean_of(score),
        score_error=standard_error(score),
        kl=mean_of([e.kl for e in episodes]) + extra_kl,
        length=mean_of([len(e.response) for e in episodes]),
        terminated=mean_of([e.terminated for e in episodes]),
        distinct_bigrams=distinct_bigrams([turn for e in episodes for turn in turns_of(e)]),
        episodes=tuple(episodes),
        watched={name: mean_of(watched_tokens(episodes, name)) for name in watched_names(episodes)},
        rewards={name: mean_of(values) for name, values in sums.items()},
        reward_errors={name: standard_error(values) for name, values in sums.items()},
    )


def turns_of(episode: Episode) -> list[np.ndarray]:
    """Return the policy's turns: tokens of different ones are no neighbours."""
    ends = np.flatnonzero(np.diff(episode.places) != 1) + 1
    return np.split(episode.response, ends)


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean; NaN for fewer than two values, or if any is NaN."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def distinct_bigrams(responses: Sequence[np.ndarray]) -> float:
    """Return the number of different pairs of neighbouring tokens divided by the number of pairs
    (Li et al. 2016, distinct-2)."""
    pairs = [
        pair
        for response in responses
        for pair in zip(response[:-1].tolist(), response[1:].tolist(), strict=True)
    ]
    return len(set(pairs)) / len(pairs) if pairs else float("nan")
