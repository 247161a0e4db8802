"""The tokens that PPO needs on DelayedKey-v0, by reward design.

The score is decided by the first token and paid T - 1 tokens later. Everything except the reward
(and lambda) is the same: the default small transformer policy, five seeds of environment,
initialisation and sampling, and budgets in tokens that the policy emitted.

What is measured is the share of J* - J(pi_ref) that a policy closes, (J - J_ref) / (J* - J_ref). J
is exact in every state that sampled texts reach (`oracle.evaluate`), so its error is small. "tokens
to 80%" is where the share first is 0.8 or more, measured about every `EVERY` tokens.

Wanted at T = 16: `oracle` gets there within 100,000 tokens, and `terminal` (lambda 0.95) is below
half at 150,000. Wanted at T = 32: `oracle` within 250,000, and `terminal` below 0.1 at 300,000.
`terminal` with lambda 1 is shown beside. The settings were chosen on seeds 0 to 4; `--seeds 5 6 7 8
9` shows others.
"""

import argparse
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import tokenenv  # noqa: F401  (registers the ids)
from tokenenv.agents import PPO, LMPolicy
from tokenenv.agents.run.evaluate import next_token_probs
from tokenenv.models.residual_lm import ResidualLM

BETA, GOAL, EVERY, N = 0.05, 0.8, 10_000, 64
SETTINGS: dict[str, Any] = {
    "lr": 3e-3,
    "lr_schedule": "constant",
    "batch_tokens": 2048,
    "vf_coef": 0.1,
}
"""Settings of PPO, the same for all designs."""
BUDGETS = {"oracle": {16: 100_000, 32: 250_000}, "terminal": {16: 150_000, 32: 300_000}}
DESIGNS: dict[str, dict[str, Any]] = {
    "oracle": {"lambda_": 0.95},
    "terminal": {"lambda_": 0.95},
    "terminal, lambda 1": {"lambda_": 1.0},
}
console = Console()


@dataclass(frozen=True)
class Curve:
    """One run: the share closed after so many tokens, measured several times."""

    tokens: list[int]
    share: list[float]
    budget: int

    def reached(self) -> int | None:
        """Return the tokens to the goal; None if it was not reached within the budget, which the
        last update may exceed."""
        points = zip(self.tokens, self.share, strict=True)
        return next(
            (tokens for tokens, share in points if share >= GOAL and tokens <= self.budget), None
        )


def run(design: str, length: int, seed: int) -> Curve:
    """Train one policy, and measure it as it learns."""
    torch.set_num_threads(1)
    reward, lambda_ = design.split(",")[0], DESIGNS[design]["lambda_"]
    options = {"max_new_tokens": length, "task_seed": seed, "kl_coef": BETA, "reward": reward}
    envs = gym.make_vec("tokenenv/DelayedKey-v0", num_envs=N, autoreset_mode="SameStep", **options)
    policy = LMPolicy(ResidualLM(envs.unwrapped.reference, seed=seed))
    agent = PPO(
        envs, policy=policy, seed=seed, lambda_actor=lambda_, lambda_critic=lambda_, **SETTINGS
    )
    oracle = envs.unwrapped.oracle
    floor, best = oracle.reference_objective(), oracle.optimal_objective(BETA)
    curve = Curve([], [], BUDGETS[reward][length])

    def measure(metrics: Any, episodes: Any) -> None:
        due = not curve.tokens or agent.tokens_seen >= curve.tokens[-1] + EVERY
        if not due and agent.tokens_seen < curve.budget:
            return
        found = oracle.evaluate(next_token_probs(policy), BETA, num_texts=256, seed=seed)
        curve.tokens.append(agent.tokens_seen)
        curve.share.append((found.objective - floor) / (best - floor))

    agent.learn(curve.budget, on_update=measure)
    return curve


def row(design: str, curves: list[Curve]) -> tuple[str, ...]:
    """Return a table row of one design's seeds. Runs that did not get there are shown as such."""
    reached = [curve.reached() for curve in curves]
    ends = [curve.share[-1] for curve in curves]
    tokens = " ".join("never" if t is None else f"{t / 1000:.0f}k" for t in reached)
    ok = sum(t is not None for t in reached)
    shares = " ".join(f"{share:.2f}" for share in ends)
    return design, f"{ok} of {len(curves)}", tokens, shares, f"{statistics.median(ends):.2f}"


def main() -> None:
    """Run what is asked for, and print a table for each length."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="*", default=[16, 32], choices=[16, 32])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--designs", nargs="*", default=list(DESIGNS), choices=list(DESIGNS))
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, a core each")
    args = parser.parse_args()
    plan = [
        (design, length, seed)
        for length in args.lengths
        for design in args.designs
        for seed in args.seeds
    ]
    with ProcessPoolExecutor(args.workers) as pool:
        runs = pool.map(run, *zip(*plan, strict=True))
        found = list(track(runs, "runs", total=len(plan), console=console, transient=True))
    curves = dict(zip(plan, found, strict=True))
    for length in args.lengths:
        columns = ("reached 80%", "tokens to 80%, by seed", "share at the end, by seed", "median")
        budgets = ", ".join(f"{reward} {tokens[length]:,}" for reward, tokens in BUDGETS.items())
        table = Table("design", *columns)
        table.title = f"DelayedKey-v0, T = {length}, budgets {budgets}"
        for design in args.designs:
            table.add_row(*row(design, [curves[design, length, seed] for seed in args.seeds]))
        console.print(table)


if __name__ == "__main__":
    main()
