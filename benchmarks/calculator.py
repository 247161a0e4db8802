"""What PPO learns on Calculator-v0, by reward design: to call the calculator.

Everything except the reward is the same: the command line's PPO, and seeds of the sampling and of
the questions. `terminal` pays the score at the last token, `turn` pays the task's own turn reward
(0.2 for the first call that fits the question, and the score), and `token` pays at each token what
it changes in the share of the right answer that stands in the text, `Process("delta")`: a rule, no
learned model.

What is measured, on held-out questions: the share of right answers, of all questions and of those
that the reference cannot answer by itself, the share of texts with a call, own tokens of a text and
KL(pi || pi_ref) of a text in nats; means over the seeds and their standard deviations. Wanted: each
design is right in 0.8 or more of the texts, of which the reference is right in fewer than half.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import gymnasium as gym
import torch
from rich.console import Console
from rich.table import Table

import tokenenv  # noqa: F401  (registers the ids)
from tokenenv.agents import PPO
from tokenenv.agents.run.evaluate import evaluate
from tokenenv.envs.language.calculator import CLOSE, PLUS
from tokenenv.rewards.process import Process

ID, N = "tokenenv/Calculator-v0", 64
DESIGNS: dict[str, Any] = {"terminal": "terminal", "turn": "turn", "token": Process("delta")}
console = Console()


@dataclass(frozen=True)
class Found:
    """What was measured of one policy: means over texts."""

    right: float
    hard: float
    """Of the questions that are no sum of two numbers."""
    calls: float
    length: float
    kl: float


def make(design: str, split: str) -> Any:
    """Make the env of one design."""
    options = {"reward": DESIGNS[design], "split": split, "autoreset_mode": "SameStep"}
    return gym.make_vec(ID, num_envs=N, **options)


def measure(agent: PPO, texts: int, seed: int) -> Found:
    """Measure the policy on held-out questions."""
    found = evaluate(agent, make("terminal", "test"), num_texts=texts, seed=seed)
    hard = [e.score for e in found.episodes if list(e.prompt).count(PLUS) != 1]
    calls = statistics.fmean(CLOSE in e.response.tolist() for e in found.episodes)
    return Found(found.gold, statistics.fmean(hard), calls, found.length, found.kl)


def run(design: str, seed: int, budgets: Sequence[int], texts: int) -> list[Found]:
    """Train one policy, and measure it at the beginning and at each budget of tokens."""
    agent = PPO(make(design, "train"), seed=seed, lr_schedule="constant")
    found = [measure(agent, texts, seed)]

    def watch(metrics: Any, episodes: Any) -> None:
        if len(found) <= len(budgets) and agent.tokens_seen >= budgets[len(found) - 1]:
            found.append(measure(agent, texts, seed))

    agent.learn(budgets[-1], on_update=watch)
    return found


def mean_and_deviation(numbers: Sequence[float]) -> str:
    """Write the mean of some numbers and their standard deviation."""
    spread = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
    return f"{statistics.fmean(numbers):.2f} ± {spread:.2f}"


def row(name: str, tokens: int, seeds: Sequence[Found]) -> tuple[str, ...]:
    """Return a table row: the mean over seeds and the deviation of each number."""
    cells = map(mean_and_deviation, zip(*map(astuple, seeds), strict=True))
    return name, f"{tokens:,}", *cells


def main() -> None:
    """Run what is asked for, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, nargs="*", default=[10_000, 30_000])
    parser.add_argument("--texts", type=int, default=256, help="texts of a measurement")
    parser.add_argument("--designs", nargs="*", default=list(DESIGNS), choices=list(DESIGNS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[list[Found]]] = {design: [] for design in args.designs}
    for seed in args.seeds:
        for design in args.designs:
            found[design].append(run(design, seed, args.tokens, args.texts))
            after = ", ".join(f"{one.right:.2f} ({one.calls:.2f})" for one in found[design][-1])
            console.print(f"{design}, seed {seed}: right (with a call) {after}")
    columns = ("right", "hard ones", "with a call", "own tokens", "KL")
    table = Table("reward", "tokens", *columns, title=f"{ID}, seeds {args.seeds}")
    for design in args.designs:
        for at, seeds in zip([0, *args.tokens], zip(*found[design], strict=True), strict=True):
            table.add_row(*row("reference" if at == 0 else design, at, seeds))
        table.add_section()
    console.print(table)


if __name__ == "__main__":
    main()
