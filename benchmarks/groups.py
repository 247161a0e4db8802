"""The age of texts in groups, and what GRPO learns where nearly all of its groups are flat.

Staleness is measured on texts of geometric length (mean T / 4, cut at T) in groups of four, as a
run collects them, over its last 40 updates. GRPO runs with its defaults on PlantedPhrase-v0
(vocabulary 16, 8 tokens, no decoys, beta 0.01), and the share of J* - J(pi_ref) that it closes is
printed.
"""

import argparse
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from rich.console import Console
from rich.table import Table

# The env whose lengths are known is the tests'.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

from line_env import LineActor, LineEnv

import tokenenv  # noqa: F401  (registers the ids)
from tokenenv.agents import GRPO
from tokenenv.agents.rollout.collector import Collector
from tokenenv.agents.run.evaluate import next_token_probs

SETTINGS = [
    (64, 64, 2048, None, 401),
    (64, 64, 2048, 1, 121),
    (64, 64, 2048, 0, 121),
    (64, 256, 2048, None, 121),
    (64, 256, 2048, 1, 121),
    (64, 64, 8192, None, 121),
    (256, 64, 2048, None, 121),
]
"""T, slots, batch_tokens, max_staleness and updates of each row."""
BETA = 0.01


def staleness(length: int, slots: int, tokens: int, limit: int | None, updates: int) -> list[str]:
    """Return a row of the table: the ages of texts, in updates, and what they cost."""
    env = LineEnv(slots, AutoresetMode.SAME_STEP, 4, T=length)
    collector = Collector(env, LineActor(4 / length), group_size=4, max_staleness=limit)
    ages, learned, sizes, first = [], 0, [], 0.0
    for update in range(updates):
        episodes = collector.collect(tokens)
        lengths = [len(e.response) for e in episodes]
        first = first or float(np.mean(lengths))
        learned += sum(lengths)
        if update >= updates - 40:
            ages += [collector.version - e.version for e in episodes]
            sizes.append(sum(lengths))
        collector.refresh()
    true = sum((1 - 4 / length) ** t for t in range(length))
    figures = (
        f"{np.mean(ages):.2f}, {max(ages)}",
        f"{np.mean(sizes):,.0f}",
        f"{env.emitted / learned:.2f}",
    )
    return [f"{length}, {slots}, {tokens:,}", str(limit), *figures, f"{first:.1f} ({true:.1f})"]


def closed(seed: int, total_tokens: int) -> float:
    """Return the share of J* - J(pi_ref) that one run of GRPO closes."""
    options = {"autoreset_mode": "SameStep", "group_size": 4, "kl_coef": BETA}
    task = {"vocab_size": 16, "max_new_tokens": 8, "num_decoys": 0}
    envs = gym.make_vec("tokenenv/PlantedPhrase-v0", num_envs=256, **options, **task)
    oracle = envs.unwrapped.oracle
    agent = GRPO(envs, seed=seed, lr=2e-3, batch_tokens=4096).learn(total_tokens)
    found = oracle.evaluate(next_token_probs(agent.policy), BETA, num_texts=256, seed=1).objective
    floor = oracle.reference_objective()
    return (found - floor) / (oracle.optimal_objective(BETA) - floor)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    help = "that GRPO emits for each seed"
    parser.add_argument("--total-tokens", type=int, default=100_000, help=help)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    ages = ("max_staleness", "mean, largest", "batch", "emitted per learned")
    table = Table("T, slots, batch_tokens", *ages, "first (true) length")
    for setting in SETTINGS:
        table.add_row(*staleness(*setting))
    console = Console(width=120)
    console.print(table)
    for seed in options.seeds:
        share = closed(seed, options.total_tokens)
        console.print(f"GRPO, seed {seed}: {share:.3f} of J* - J(pi_ref) closed")


if __name__ == "__main__":
    main()
