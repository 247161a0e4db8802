"""Entropy bounds hindsight credit: whether it does, how close the bound is, and whether entropy
says which tokens matter.

    python benchmarks/suite/entropy_bound/run.py

HAPO ("Where Hindsight Credit Can Reside", arXiv 2604.11056) takes the credit of a token for the
shift from the policy pi(a|s) to the hindsight posterior h(a|s, outcome) (Harutyunyan et al. 2019,
arXiv 1912.02503). Its mean over outcomes and tokens is a conditional mutual information, so that

    I(a; outcome | s) = E_outcome KL(h(.|s, outcome) || pi(.|s)) <= H(pi(.|s)),

and it gives tokens of high entropy more of the advantage. Its abstract claims the bound and better
reasoning scores, and says nothing of how tight the bound is.

Here all of it is exact, by induction over the states (step, automaton state, last word) of four
automata: outcomes are the scores of finished texts, or whether a text scores more than the
reference's mean. Policies: the reference, a random one, and the optima at three betas, which
training goes to. Seeds draw the reference and the random policy.

- excess: the largest I - H over all states; above 0 (and rounding) the bound would be broken;
- tightness: E[I] / E[H] over the states that the policy visits; 1 is a bound that says all;
- above: how often (of visits and outcomes) the shift for one outcome, KL(h || pi) before the mean
  is taken, is larger than the entropy;
- rho entropy: Spearman's correlation of H with E|Q - V| of a state, over the states that the policy
  visits, each counted by its visits; "rho token" with |Q - V| of the token that is written, and
  "rho in text" the same among the tokens of a text, as the mean over texts: over 256 sampled texts;
- rho credit: of I with E|Q - V|, what knowing the exact credit would give.
"""

import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import gymnasium as gym
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from tidy import Row, console, print_table, write

import tokenenv  # noqa: F401  (registers the ids)
from tokenenv.envs.automata.oracle import AutomatonOracle, tilted
from tokenenv.fit.measure import spearman

RESULTS = Path(__file__).parent / "results" / "results.csv"
ENVS = ("Negation-v0", "PlantedPhrase-v0", "Brackets-v0", "DelayedKey-v0")
POLICIES = ("reference", "random", "optimum, beta 0.2", "optimum, beta 0.1", "optimum, beta 0.05")
OUTCOMES = ("score", "success")
SEEDS = range(10)
TEXTS = 256
CONCENTRATION = 0.3
"""Of the Dirichlet distribution that random policies are drawn from."""
DIGITS = 12
"""Numbers that differ by less are one: a rank must not say which of two zeros was rounded up."""


@dataclass(frozen=True)
class Step:
    """A policy at one step of the text. Suffixes: S states (automaton state q, last word u) that
    are visited, V words, O outcomes."""

    states: np.ndarray
    """(S, 2) int64: q and u."""
    visits: np.ndarray
    """(S,): how often."""
    probs: np.ndarray
    """pi (S, V)."""
    outcomes: np.ndarray
    """P(outcome | s, a), (S, V, O)."""
    worth: np.ndarray
    """Q(s, a), (S, V): the mean score after a word."""


def entropy(probs: np.ndarray) -> np.ndarray:
    """Return H in nats along the last axis."""
    return -(probs * np.log(np.where(probs > 0, probs, 1.0))).sum(-1)


def shifts(probs: np.ndarray, outcomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return P(outcome | s) and KL(h(.|s, outcome) || pi(.|s)), (S, O) each, of a policy (S, V) and
    the outcomes' chances (S, V, O): h = pi P(outcome | s, a) / P(outcome | s)."""
    joint = probs[..., None] * outcomes
    chance = joint.sum(1)
    ratio = outcomes / np.where(chance > 0, chance, 1.0)[:, None]
    each = joint * np.log(np.where(joint > 0, ratio, 1.0))
    return chance, each.sum(1) / np.where(chance > 0, chance, 1.0)


def steps_of(oracle: AutomatonOracle, policy: str, outcome: str, seed: int) -> list[Step]:
    """Return what a policy does, and what comes of it, in all states that it visits."""
    probs = tables(oracle, policy, seed)
    payoff, after = oracle.automaton.payoff, oracle.automaton.transitions
    kinds, kind = np.unique(
        payoff if outcome == "score" else payoff > oracle.reference_objective(), return_inverse=True
    )
    Q, V, U = len(payoff), oracle.vocab_size, oracle.vocab_size + 1
    words = np.arange(V)
    # The last column is the score itself, whose mean is Q(s, a).
    ends = np.concatenate([np.eye(len(kinds))[kind], payoff[:, None]], 1)
    later = np.repeat(ends[:, None], U, axis=1)
    ahead = []
    for table in probs[::-1]:
        ahead.append(later[after, words])  # (Q, V, O + 1): a state and a word lead to one state
        later = np.einsum("quv,qvo->quo", table, ahead[-1])
    visits, steps = np.zeros((Q, U)), []
    visits[0, -1] = 1.0
    for table, found in zip(probs, ahead[::-1], strict=True):
        states = np.argwhere(visits > 0)
        q, u = states.T
        here, mass = table[q, u], visits[q, u]
        steps.append(Step(states, mass, here, found[q, :, :-1], found[q, :, -1]))
        visits = np.zeros((Q, U))
        np.add.at(visits, (after[q], np.broadcast_to(words, here.shape)), mass[:, None] * here)
    return steps


def tables(oracle: AutomatonOracle, policy: str, seed: int) -> np.ndarray:
    """Return a policy (T, Q, U, V), U the last words with that of no word yet."""
    T, Q, V = oracle.max_new_tokens, oracle.automaton.num_states, oracle.vocab_size
    if policy == "random":
        rng = np.random.default_rng(seed)
        return rng.dirichlet(np.full(V, CONCENTRATION), size=(T, Q, V + 1))
    shape = (T, Q, V + 1, V)
    reference = np.broadcast_to(oracle.reference.probs, shape)
    if policy == "reference":
        return reference
    beta = float(policy.rsplit(" ", 1)[1])
    values = np.broadcast_to(oracle.token_values(beta)[:, :, None], shape)
    return tilted(reference.reshape(-1, V), values.reshape(-1, V), beta).reshape(shape)


def weighted_ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the rank of each value where it occurs `weights` times; equal values share a rank."""
    _, number = np.unique(values.round(DIGITS), return_inverse=True)
    mass = np.bincount(number, weights)
    return (np.cumsum(mass) - mass / 2)[number]


def weighted_spearman(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float:
    """Return Spearman's correlation of values that occur `weights` times."""
    weights = weights / weights.sum()
    ranks = [weighted_ranks(values, weights) for values in (x, y)]
    # Pearson's with weights: each deviation times the root of its weight.
    one, other = (np.sqrt(weights) * (rank - weights @ rank) for rank in ranks)
    size = np.sqrt((one @ one) * (other @ other))
    return float(one @ other / size) if size > 0 else float("nan")


def sampled(
    oracle: AutomatonOracle, steps: list[Step], seed: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return H and |Q - V| of the words of sampled texts, (T,) for each text."""
    rng, each = np.random.default_rng([seed, 1]), np.arange(TEXTS)
    state, last = np.zeros(TEXTS, dtype=np.int64), np.full(TEXTS, oracle.vocab_size)
    entropies, gains = [], []
    for step in steps:
        number = {tuple(one): row for row, one in enumerate(step.states)}
        rows = np.array([number[one] for one in zip(state, last, strict=True)])
        probs, worth = step.probs[rows], step.worth[rows]
        last = np.minimum((probs.cumsum(1) < rng.random((TEXTS, 1))).sum(1), probs.shape[1] - 1)
        state = oracle.automaton.transitions[state, last]
        entropies.append(entropy(probs))
        gains.append(np.abs(worth[each, last] - (probs * worth).sum(1)).round(DIGITS))
    return list(np.stack(entropies, 1)), list(np.stack(gains, 1))


def measured(oracle: AutomatonOracle, policy: str, outcome: str, seed: int) -> Row:
    """Return the figures of one policy."""
    steps = steps_of(oracle, policy, outcome, seed)
    visits = np.concatenate([step.visits for step in steps])
    bounds = np.concatenate([entropy(step.probs) for step in steps])
    found = [shifts(step.probs, step.outcomes) for step in steps]
    chance, shift = (np.concatenate(parts) for parts in zip(*found, strict=True))
    credit = (chance * shift).sum(1)
    gains = np.concatenate(
        [
            (s.probs * np.abs(s.worth - (s.probs * s.worth).sum(1, keepdims=True))).sum(1)
            for s in steps
        ]
    )
    token, text = spearman(*sampled(oracle, steps, seed))
    above = shift > bounds[:, None] + 1e-9
    return {
        "excess": float((credit - bounds).max()),
        "tightness": float(visits @ credit / (visits @ bounds)),
        "above": float((visits[:, None] * chance * above).sum() / visits.sum()),
        "rho entropy": weighted_spearman(bounds, gains, visits),
        "rho token": token,
        "rho in text": text,
        "rho credit": weighted_spearman(credit, gains, visits),
    }


def main() -> None:
    rows = []
    for env in ENVS:
        for seed in SEEDS:
            console.print(f"{env}, seed {seed}", highlight=False)
            oracle = gym.make_vec(f"tokenenv/{env}", 1, task_seed=seed).unwrapped.oracle
            for policy, outcome in product(POLICIES, OUTCOMES):
                setting = {"env": env, "policy": policy, "outcome": outcome, "seed": seed}
                rows.append(setting | measured(oracle, policy, outcome, seed))
    rows.sort(key=lambda r: (ENVS.index(r["env"]), POLICIES.index(r["policy"]), r["outcome"]))
    write(RESULTS, rows)
    figures = {name: 2 for name in rows[0] if name.startswith("rho")}
    figures = {"excess": 9, "tightness": 3, "above": 3} | figures
    print_table(rows, ["env", "policy", "outcome"], figures, "Entropy and hindsight credit")


if __name__ == "__main__":
    main()
