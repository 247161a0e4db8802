"""Return-preserving is not gradient-preserving: what placing a score on tokens does to the policy
gradient.

    python benchmarks/suite/gradient_preserving/run.py

Every design here pays a text its score R in all, up to a constant of the prompt. Attention-based
credit (arXiv 2402.00782) and SCAR (arXiv 2505.20417) conclude that the optimum is that of R. But a
learner follows reward-to-go, which leaves the rewards before a token out; that is right only if
they did not depend on it or on what came later.

The world has 3 tokens, texts of 4 and a random policy with a row of logits for each history, so
that all 81 texts are enumerated and nothing is sampled. "any" gives each text a random score (and
each unfinished text too, which is what a model reads that leaves tokens out). In "sum" each token
adds a number of its own, so that leaving a token out says exactly what it earned.

- error: |g - g*| / |g*| of the expected gradient g by the logits, g* that of E[R];
- cosine: of the angle between the two;
- variance: of the gradient of one text (the trace of its covariance), relative to "terminal".

No baseline is subtracted anywhere.
"""

import sys
from collections.abc import Callable
from itertools import combinations
from math import comb
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[3] / "tests" / "helpers"))

# The world is the tests'.
from tabular import T, V, World, relative_error, to_go
from tidy import Row, console, print_table, write

RESULTS = Path(__file__).parent / "results" / "results.csv"
SEEDS = range(10)


def world_of(scores: str, seed: int) -> World:
    """Make the world: its texts all have T tokens."""
    world = World(seed)
    if scores == "sum":
        worth = world.normal(V)
        world.scores = torch.zeros_like(world.scores)
        for history in range(1, len(world.scores)):
            before, token = divmod(history - 1, V)
            world.scores[history] = world.scores[before] + worth[token]
    return world


def expected_scores(world: World, logits: Tensor) -> Tensor:
    """Return E[R | history] of texts that a policy with these logits goes on with, for each
    history."""
    values, inner = world.scores.clone(), len(logits) - V**T
    for history in reversed(range(inner)):
        children = V * history + 1 + torch.arange(V)
        values[history] = logits[history].softmax(-1) @ values[children]
    return values


def without(world: World, kept: tuple[int, ...]) -> Tensor:
    """Return the scores (B,) of the texts of which the tokens at these places are kept."""
    history = torch.zeros(len(world.tokens), dtype=torch.int64)
    for t in kept:
        history = world.reference.after(history, world.tokens[:, t])
    return world.scores[history]


def prefix_difference(world: World, values: Tensor) -> Tensor:
    """Return r_t = f(y_<=t) - f(y_<t) (B, T), with R in the place of f at the end."""
    after = torch.where(world.final, world.scores[world.after], values[world.after])
    return after - values[world.before]


def leave_one_out(world: World) -> Tensor:
    """Return r_t = R - R(text without y_t) (B, T), and the rest on the last token."""
    score = world.rewards(per_token=False).sum(1)
    places = range(T)
    losses = [score - without(world, tuple(k for k in places if k != t)) for t in places]
    paid = torch.stack(losses, 1)
    return paid + world.final * (score - paid.sum(1))[:, None]


def shapley(world: World) -> Tensor:
    """Return the Shapley values (B, T) of the tokens: the mean gain of joining, over all orders."""
    paid = torch.zeros(world.tokens.shape, dtype=torch.float64)
    for t in range(T):
        others = [k for k in range(T) if k != t]
        for size in range(T):
            for some in combinations(others, size):
                gain = without(world, tuple(sorted((*some, t)))) - without(world, some)
                paid[:, t] += gain / (T * comb(T - 1, size))
    return paid


def shares(world: World) -> Tensor:
    """Return R in random positive shares of each text (B, T): attention that knows nothing."""
    weights = world.shares.softmax(1)
    return weights * world.rewards(per_token=False).sum(1, keepdim=True)


def whole(rewards: Tensor) -> Tensor:
    """Return the whole return at each token."""
    return rewards.sum(1, keepdim=True).expand_as(rewards)


DESIGNS: dict[str, Callable[[World], Tensor]] = {
    "terminal": lambda world: to_go(world.rewards(per_token=False)),
    "prefix difference, random f": lambda world: to_go(
        prefix_difference(world, world.normal(len(world.scores)))
    ),
    "prefix difference, f = E_ref[R | prefix]": lambda world: to_go(
        prefix_difference(world, expected_scores(world, world.reference.logprobs))
    ),
    "prefix difference, f = E_pi[R | prefix]": lambda world: to_go(
        prefix_difference(world, expected_scores(world, world.policy))
    ),
    "uniform": lambda world: to_go(
        world.rewards(per_token=False).sum(1, keepdim=True).expand(-1, T) / T
    ),
    "random attention": lambda world: to_go(shares(world)),
    "leave-one-out + rest": lambda world: to_go(leave_one_out(world)),
    "shapley": lambda world: to_go(shapley(world)),
    "random attention, whole return at each token": lambda world: whole(shares(world)),
}
"""The credit (B, T) of each token: the factor of its grad log pi."""


def variance(world: World, credit: Tensor) -> float:
    """Return the trace of the covariance of `sum_t credit_t grad log pi_t` over the policy's
    texts. Each token has a row of logits of its own, so that the squares of the rows add up."""
    prob = world.policy.softmax(-1)
    square = 1 - 2 * prob[world.before, world.tokens] + (prob**2).sum(-1)[world.before]
    second = world.probs(world.policy) @ (credit**2 * square).sum(1)
    return float(second - world.policy_gradient(credit).square().sum())


def measured(scores: str, seed: int) -> list[Row]:
    """Return a line for each design in one world."""
    world = world_of(scores, seed)
    score = world.rewards(per_token=False).sum(1)
    exact = world.gradient_of_mean(lambda logprob: score)
    sparse = variance(world, DESIGNS["terminal"](world))
    rows = []
    for name, design in DESIGNS.items():
        credit = design(world)
        found = world.policy_gradient(credit)
        rows.append(
            {
                "scores": scores,
                "design": name,
                "seed": seed,
                "error": relative_error(found, exact),
                "cosine": float((found * exact).sum() / (found.norm() * exact.norm())),
                "variance": variance(world, credit) / sparse,
            }
        )
    return rows


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for scores in ("any", "sum"):
        for seed in SEEDS:
            console.print(f"scores {scores}, seed {seed}", end="\r")
            rows += measured(scores, seed)
    rows.sort(key=lambda row: row["scores"])
    write(RESULTS, rows)
    figures = {"error": 2, "cosine": 2, "variance": 2}
    print_table(rows, ["scores", "design"], figures, "Gradient of a placed score")


if __name__ == "__main__":
    main()
