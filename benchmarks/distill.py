"""What distillation from pi* saves against reinforcement learning, on two automata whose optimum is
known: Negation-v0, and an easy DelayedKey-v0 (8 words, one of 4 keys, the door with probability
1/8), since with its defaults `terminal` does not get there in 150,000 tokens
(benchmarks/delayed_key.py).

All rows are the bundled PPO on the default small policy, with five seeds of environment,
initialisation and sampling. They differ in what is learned from:

- "terminal": the score at the end.
- "distill, oracle": the teacher's log-ratio as a reward, with the KL penalty. As pi* is the
  teacher, it is what `oracle` pays, the best dense reward there is; a test compares them.
- "distill, gamma 0": the same, and each token is credited with its own reward alone.
- "distill, first 30%": the teacher is paid in the first 30% of the tokens. "The best that it can
  reach" is the exact regret of pi* there and of the reference behind it.
- "forward KL": no reward, and KL(pi_T || pi) over the vocabulary as a loss (`distill_coef`).

The learning rate of each row is chosen between two, by the mean regret of one run with a seed that
is not reported. Regret is J* - J, computed exactly in the states that sampled texts reach. "Tokens
to 50%" is when it is first half of the reference's, interpolated between measurements. "Saved" is
the ratio of the tokens of "terminal" to those of a row with the same seed: its geometric mean and
95% t interval over the seeds. Where a run did not get there, its budget stands in, and the ratio is
marked "at least" (terminal's) or "at most" (the row's).
"""

import argparse
import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import tokenenv  # noqa: F401  (registers the ids)
from tokenenv.agents import PPO, LMPolicy
from tokenenv.agents.run.evaluate import next_token_probs
from tokenenv.models.residual_lm import ResidualLM
from tokenenv.rewards.distill import Distill, share_of

BETA, N, FIRST, SWEEP_SEED = 0.05, 64, 0.3, 100
RATES = (3e-3, 1e-2)
GOALS = (0.5, 0.1)
T95 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""The 97.5% quantile of Student's t with 1, 2, ... degrees of freedom."""
SETTINGS: dict[str, Any] = {"lr_schedule": "constant", "batch_tokens": 2048, "vf_coef": 0.1}
"""Of PPO, the same for all rows."""
console = Console(width=120)


@dataclass(frozen=True)
class Problem:
    """A task, and the tokens at which the table shows the regret; the last is the budget."""

    env_id: str
    options: dict[str, Any]
    shown: tuple[int, ...]


PROBLEMS = {
    "Negation-v0": Problem("tokenenv/Negation-v0", {}, (2_000, 4_000, 8_000, 16_000, 20_000)),
    "DelayedKey-v0, easy": Problem(
        "tokenenv/DelayedKey-v0",
        {"max_new_tokens": 8, "num_keys": 4, "door_mass": 1 / 8},
        (2_000, 4_000, 8_000, 16_000, 30_000),
    ),
}


@dataclass(frozen=True)
class Row:
    """What a row of the table learns from."""

    env: dict[str, Any]
    agent: dict[str, Any] = field(default_factory=dict)


ROWS = {
    "terminal": Row({"reward": "terminal"}),
    "distill, oracle": Row({"reward": "distill"}),
    "distill, gamma 0": Row({"reward": "distill"}, {"gamma": 0.0}),
    "forward KL": Row({"reward": {}, "kl": "none"}, {"distill_coef": 1.0}),
    "distill, first 30%": Row({"reward": Distill(first=FIRST)}),
}


@dataclass(frozen=True)
class Curve:
    """The regret after so many tokens; it begins with the reference's at 0 tokens."""

    tokens: list[float]
    regret: list[float]

    def at(self, tokens: float) -> float:
        """The regret after `tokens`, interpolated."""
        return float(np.interp(tokens, self.tokens, self.regret))

    def reached(self, share: float) -> float | None:
        """Tokens until the regret is first this share of the reference's; None if never."""
        goal = share * self.regret[0]
        for i in range(1, len(self.tokens)):
            if self.regret[i] <= goal:
                rates, tokens = self.regret[i - 1 : i + 1], self.tokens[i - 1 : i + 1]
                return float(np.interp(-goal, [-rate for rate in rates], tokens))
        return None


def make(problem: Problem, seed: int, **options: Any) -> Any:
    """The environment of a seed."""
    given = {"task_seed": seed, "kl_coef": BETA, "autoreset_mode": "SameStep"}
    return gym.make_vec(problem.env_id, num_envs=N, **given, **problem.options, **options)


def run(problem: str, row: str, lr: float, seed: int) -> Curve:
    """Train one policy, and measure it as it learns."""
    torch.set_num_threads(1)
    what, chosen = PROBLEMS[problem], ROWS[row]
    envs, budget = make(what, seed, **chosen.env), what.shown[-1]
    oracle = envs.unwrapped.oracle
    policy = LMPolicy(ResidualLM(envs.unwrapped.reference, seed=seed))
    agent = PPO(envs, policy=policy, seed=seed, lr=lr, **SETTINGS, **chosen.agent)
    start = oracle.optimal_objective(BETA) - oracle.reference_objective()
    curve = Curve([0.0], [start])

    def measure(metrics: Any, episodes: Any) -> None:
        due = agent.tokens_seen >= curve.tokens[-1] + budget / 15
        if due or agent.tokens_seen >= budget:
            found = oracle.evaluate(next_token_probs(policy), BETA, num_texts=128, seed=seed)
            curve.tokens.append(agent.tokens_seen)
            curve.regret.append(found.regret)

    agent.learn(budget, on_update=measure)
    return curve


def masked_regret(problem: Problem, seed: int) -> float:
    """The regret of pi* in the first 30% of the tokens, and the reference behind them."""
    envs = make(problem, seed).unwrapped
    oracle, until = envs.oracle, share_of(FIRST, envs.token_spec.max_new_tokens)

    def policy(obs: dict[str, np.ndarray]) -> np.ndarray:
        last = obs["tokens"][np.arange(len(obs["length"])), obs["length"] - 1]
        if obs["length"][0] - 1 < until:
            return oracle.policy(obs, BETA)
        return oracle.reference.probs[last]

    return oracle.evaluate(policy, BETA, markov=True).regret


def all_runs(plan: list[tuple[str, str, float, int]], workers: int) -> dict[Any, Curve]:
    """The curve of each run of a plan."""
    with ProcessPoolExecutor(workers) as pool:
        runs = pool.map(run, *zip(*plan, strict=True))
        found = track(runs, "runs", total=len(plan), console=console, transient=True)
        return dict(zip(plan, found, strict=True))


def mean_of(values: list[float]) -> str:
    """A mean and its standard error."""
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1) / math.sqrt(len(values)):.3f}"


def tokens_to(curves: list[Curve], share: float) -> str:
    """The median of the tokens to a goal, and how many runs got there."""
    reached = [curve.reached(share) for curve in curves]
    there = sum(one is not None for one in reached)
    if there <= len(curves) // 2:
        return f"never in {len(curves) - there} of {len(curves)}"
    median = float(np.median([math.inf if one is None else one for one in reached]))
    missing = "" if there == len(curves) else f" ({there} of {len(curves)})"
    return f"{median / 1000:.1f}k{missing}"


def saved(curves: list[Curve], terminal: list[Curve], share: float) -> str:
    """How many times fewer tokens than `terminal`: geometric mean and 95% t interval."""
    both = list(zip(curves, terminal, strict=True))
    pairs = [(one.reached(share), rl.reached(share)) for one, rl in both]
    late, slow = (any(pair[i] is None for pair in pairs) for i in (0, 1))
    if late and slow:
        return "not known"
    ratios = [
        math.log((rl or base.tokens[-1]) / (one or curve.tokens[-1]))
        for (one, rl), (curve, base) in zip(pairs, both, strict=True)
    ]
    center = float(np.mean(ratios))
    error = float(np.std(ratios, ddof=1)) / math.sqrt(len(ratios))
    half = error * T95[len(ratios) - 2]
    low, mean, high = (math.exp(center + part) for part in (-half, 0.0, half))
    bound = "at least " if slow else "at most " if late else ""
    return f"{bound}{mean:.1f}x ({low:.1f} to {high:.1f})"


def best_rate(swept: dict[Any, Curve], problem: str, row: str) -> float:
    """The learning rate with the smallest mean regret over its run."""
    return min(RATES, key=lambda lr: float(np.mean(swept[problem, row, lr, SWEEP_SEED].regret)))


def main() -> None:
    """Choose the learning rates, run all seeds, and print a table for each problem."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", nargs="*", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, a core each")
    args = parser.parse_args()
    for problem in args.problems:
        swept = all_runs(list(product([problem], args.rows, RATES, [SWEEP_SEED])), args.workers)
        rates = {row: best_rate(swept, problem, row) for row in args.rows}
        plan = [(problem, row, rates[row], seed) for row in args.rows for seed in args.seeds]
        found = all_runs(plan, args.workers)
        curves = {
            row: [found[problem, row, rates[row], seed] for seed in args.seeds] for row in args.rows
        }
        show(problem, curves, rates)
        limits = [masked_regret(PROBLEMS[problem], seed) for seed in args.seeds]
        console.print(f"first 30%: the best that it can reach is a regret of {mean_of(limits)}\n")


def show(problem: str, curves: dict[str, list[Curve]], rates: dict[str, float]) -> None:
    """Print the two tables of one problem: the regret, and the tokens to the goals."""
    shown = PROBLEMS[problem].shown
    regret = Table("", "lr", *(f"{tokens / 1000:.0f}k" for tokens in shown))
    start = mean_of([curve.regret[0] for curve in next(iter(curves.values()))])
    regret.title = f"{problem}: regret after so many tokens; the reference's is {start}"
    names = [name for share in GOALS for name in (f"tokens to {share:.0%}", "saved")]
    goals = Table("", *names, title=f"{problem}: tokens to a share of the reference's regret")
    for row, some in curves.items():
        regrets = (mean_of([curve.at(tokens) for curve in some]) for tokens in shown)
        regret.add_row(row, f"{rates[row]:g}", *regrets)
        cells = []
        for share in GOALS:
            compared = row != "terminal" and "terminal" in curves
            ratio = saved(some, curves["terminal"], share) if compared else ""
            cells += [tokens_to(some, share), ratio]
        goals.add_row(row, *cells)
    console.print(regret)
    console.print(goals)


if __name__ == "__main__":
    main()
