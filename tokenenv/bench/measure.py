"""What a policy is worth at one moment of a run.

Where an automaton gives the score, the policy is compared with the exact optimum, and no
environment is stepped. Elsewhere texts are sampled, from held-out prompts where the task has any.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tokenenv.agents import Agent, BestOfN, LMPolicy
from tokenenv.agents.run.evaluate import evaluate, next_token_probs
from tokenenv.envs.automata.oracle import AutomatonOracle, PolicyFunction

if TYPE_CHECKING:
    from tokenenv.cli.train import Train

Figures = dict[str, Any]
Measure = Callable[[], Figures]
COLUMNS = (
    "gold",
    "gold_error",
    "score",
    "kl",
    "length",
    "objective",
    "objective_error",
    "regret",
    "share",
    "proxy",
    "terminated",
    "distinct_bigrams",
    "method",
)
"""What an evaluation says; docs/bench.md explains each. One that is not known is None."""
MOST_TEXTS = 4096
"""Texts that are enumerated at most."""
SEED = 1_000_003
"""Added to the seed of a cell: evaluations have prompts and samples of their own."""


def make_measure(train: "Train", agent: Agent, texts: int) -> Measure:
    """Return what evaluates the agent's present policy: a function that returns a value for each of
    `COLUMNS`.

    Args:
        train: what the agent was made from.
        agent: is read when the function is called.
        texts: how many texts are sampled, where all of them cannot be enumerated.
    """
    oracle, policy, beta = agent.core.oracle, agent.policy, beta_of(agent)
    seed = SEED + train.agent.seed
    exact = isinstance(oracle, AutomatonOracle) and isinstance(policy, LMPolicy)
    if exact and not isinstance(agent, BestOfN):
        temperature = agent.config.temperature
        return lambda: filled(
            with_optimum(
                against_optimum(oracle, next_token_probs(policy, temperature), beta, texts, seed),
                oracle,
                beta,
            )
        )
    from tokenenv.cli.evaluate import split_of  # the command line imports this package

    envs = train.make_envs(**split_of(train.env), group_size=1)
    known = hasattr(oracle, "optimal_objective") and hasattr(oracle, "reference_objective")
    return lambda: filled(
        with_optimum(sampled(agent, envs, beta, texts, seed), oracle if known else None, beta)
    )


def beta_of(agent: Agent) -> float:
    """Return the beta of J, that which a run begins with; an adaptive one is not followed.

    An env that pays no KL has none, unless `kl_coef` is among its options all the same: so a KL
    that is a loss is measured by the same J as one in the reward.
    """
    config = agent.core.config
    if config.kl == "none":
        return 0.0 if config.kl_coef is None else float(config.kl_coef)
    return agent.kl_coef if agent.config.kl_coef is None else agent.config.kl_coef


def filled(found: Figures, columns: Sequence[str] = COLUMNS) -> Figures:
    """Return a value for each of the columns, with None for what is not known."""
    values = {name: found.get(name) for name in columns}
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


def with_optimum(found: Figures, oracle: Any, beta: float) -> Figures:
    """Add `regret`, J* - J, and `share`, (J - J_ref) / (J* - J_ref), where the optimum is known."""
    if oracle is None:
        return found
    best, floor = oracle.optimal_objective(beta), oracle.reference_objective()
    regret = max(best - found["objective"], 0.0)
    known = best - floor > 1e-9  # where nothing can be gained, there is no share of it
    return found | {"regret": regret, "share": 1.0 - regret / (best - floor) if known else None}


def against_optimum(
    oracle: AutomatonOracle, probs_of: PolicyFunction, beta: float, texts: int, seed: int
) -> Figures:
    """Return the figures of a policy, exactly where its texts can be enumerated.

    Elsewhere `AutomatonOracle.evaluate` draws `texts` texts for the states that occur, and what the
    policy does in each of them is exact.
    """
    length = None if oracle.source is not None else float(oracle.max_new_tokens)
    if oracle.source is None and oracle.vocab_size**oracle.max_new_tokens <= MOST_TEXTS:
        gold, kl = enumerated(oracle, probs_of)
        objective, error, method = gold - beta * kl, 0.0, "enumeration"
    else:
        found = oracle.evaluate(probs_of, beta, num_texts=texts, seed=seed)
        objective, kl, error, method = found.objective, found.kl, found.error, "states"
        # J and the KL are exact in each state, so that their sum varies less than sampled scores.
        gold = objective + beta * kl
    return {
        "gold": gold,
        "score": gold,
        "kl": kl,
        "length": length,
        "objective": objective,
        "objective_error": error,
        "gold_error": 0.0 if method == "enumeration" else None,
        "method": method,
    }


def enumerated(oracle: AutomatonOracle, probs_of: PolicyFunction) -> tuple[float, float]:
    """Return E[score] and the KL to the reference of a policy, in nats, from all texts there are.

    Every prefix is asked for the policy's next token; V^T texts need 1 + V + ... + V^(T - 1) of
    them.
    """
    count, transitions = oracle.vocab_size, oracle.automaton.transitions
    prefix, state = np.zeros((1, oracle.max_length), dtype=np.int64), np.zeros(1, dtype=np.int64)
    last, mass, kl = np.full(1, count), np.ones(1), 0.0
    for step in range(oracle.max_new_tokens):
        ones = np.ones(len(mass), dtype=np.int64)
        asked = {"tokens": prefix, "length": ones + step, "prompt_length": ones}
        probs = np.asarray(probs_of(asked), dtype=np.float64)
        probs /= probs.sum(1, keepdims=True)
        ratio = np.where(probs > 0, probs, 1.0) / oracle.reference.probs[last]
        kl += float(mass @ (probs * np.log(ratio)).sum(1))
        row, last = (grid.ravel() for grid in np.indices(probs.shape))
        mass, state = (mass[:, None] * probs).ravel(), transitions[state[row], last]
        prefix = prefix[row]
        prefix[:, step + 1] = last
    return float(mass @ oracle.automaton.payoff[state]), kl


def sampled(agent: Agent, envs: Any, beta: float, texts: int, seed: int) -> Figures:
    """Return the figures of `texts` texts; J = gold - beta KL."""
    found = evaluate(agent, envs, num_texts=texts, seed=seed)
    paid = [value for name, value in found.rewards.items() if name != "kl"]
    names = ("gold", "gold_error", "score", "kl", "length", "terminated", "distinct_bigrams")
    return {
        **{name: getattr(found, name) for name in names},
        "objective": found.gold - beta * (0.0 if math.isnan(found.kl) else found.kl),
        "objective_error": found.gold_error,
        "proxy": sum(paid) if found.rewards else None,
        "method": "sampling",
    }
