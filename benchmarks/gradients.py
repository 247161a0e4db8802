"""The cosine of the angle between each algorithm's expected gradient and the exact gradient of J =
E[score - beta KL].

The world is small enough to enumerate: 3 tokens, texts of at most 4, a policy away from its
reference. Each figure is of one update on a batch that holds every text as often as the policy
writes it, with rewards that preserve the gradient. There are three cases:

- "dense": every text has another score, and texts end at several lengths (beta 0.7).
- "flat": one text in thirty earns 1, so that nearly all groups are flat (beta 0.05, texts of one
  length).
- "stale": as "dense", with texts of an earlier policy, as the mean over the designs. The columns
  name KL(earlier || now) in nats per token.

A test, `test_gradient_table.py`, keeps what must be 1.
"""

import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

# The world and its exact results are the tests'.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

from gradients import (
    CASES,
    DESIGNS,
    WORLDS,
    Case,
    cosine,
    earlier_policy,
    exact_gradient,
    found_gradient,
    grpo_gradient,
    make_world,
)
from tabular import STOP

ROWS = {
    **CASES,
    "grpo": Case("grpo", texts=60_000),
    "ppo, lambda 0.95": Case("ppo"),
    "grpo, sequence-mean": Case("grpo", {"scale": "none"}, texts=60_000),
    "ppo, importance_cap 2": Case("ppo", {"lambda_actor": 1.0, "importance_cap": 2.0}),
}
"""The cases that are exact, and some that are not. GRPO's default is compared with the gradient of
J here, and with that of its own objective in the last row."""
DISTANCES = (0.02, 0.1)
"""How far the earlier policies are, as `earlier_policy` takes it."""


def main() -> None:
    torch.set_num_threads(1)
    dense, flat = make_world("dense", stops=(STOP,)), make_world("flat groups")
    earlier = [earlier_policy(dense, distance) for distance in DISTANCES]
    table = Table(
        "",
        *(f"dense, {d}" for d in DESIGNS),
        *(f"flat, {d}" for d in DESIGNS),
        *(f"stale, {kl:.0e}" for _, kl in earlier),
    )
    for name, case in ROWS.items():
        figures = []
        for kind, world in (("dense", dense), ("flat groups", flat)):
            exact = exact_gradient(world, WORLDS[kind])
            figures += [
                cosine(found_gradient(case, world, design, WORLDS[kind]), exact)
                for design in DESIGNS
            ]
        exact = exact_gradient(dense, WORLDS["dense"])
        for logits, _ in earlier:
            found = [
                cosine(found_gradient(case, dense, design, WORLDS["dense"], logits), exact)
                for design in DESIGNS
            ]
            figures.append(sum(found) / len(found))
        table.add_row(name, *(f"{figure:.4f}" for figure in figures))
    own = []
    for design in DESIGNS:
        terms = torch.from_numpy(flat.paid(reward=design).token_rewards).double()
        exact = grpo_gradient(flat, terms, WORLDS["flat groups"])
        own.append(
            cosine(found_gradient(CASES["grpo"], flat, design, WORLDS["flat groups"]), exact)
        )
    table.add_row(
        "grpo, its own objective", *[""] * 3, *(f"{figure:.4f}" for figure in own), "", ""
    )
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
