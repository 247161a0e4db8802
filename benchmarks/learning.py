"""What the bundled PPO learns, three seeds each, on held-out prompts: gold, KL, length, distinct
bigrams.

Reviews-v0: the share of positive reviews, wanted at 0.9 or more within 150,000 tokens. PyDocs-v0:
Flesch reading ease, wanted up by one standard deviation of the reference's texts at 20 nats of KL
per text or less.
"""

import argparse

import numpy as np
from rich.console import Console

from tokenenv.agents import PPO
from tokenenv.agents.run.evaluate import Evaluation, evaluate
from tokenenv.cli import Train
from tokenenv.cli.evaluate import comparison

console = Console()


def run(env: str, seed: int, total_tokens: int, texts: int = 256) -> tuple[Evaluation, Evaluation]:
    """The held-out evaluations before and after one run with the command line's defaults."""
    train = Train(env=env)
    held_out = train.make_envs(split="test")
    agent = PPO(train.make_envs(), train.agent, seed=seed)
    before = evaluate(agent, held_out, num_texts=texts)
    agent.learn(total_tokens, progress=True)
    return before, evaluate(agent, held_out, num_texts=texts)


def main() -> None:
    """Runs what is asked for and prints one table a seed and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--total-tokens", type=int, default=150_000)
    parser.add_argument("--env", nargs="*", default=["tokenenv/Reviews-v0", "tokenenv/PyDocs-v0"])
    args = parser.parse_args()
    for env in args.env:
        for seed in range(args.seeds):
            before, after = run(env, seed, args.total_tokens)
            spread = float(np.std([episode.gold for episode in before.episodes], ddof=1))
            console.print(f"[bold]{env}, seed {seed}, {args.total_tokens:,} tokens[/bold]")
            console.print(comparison({"before": before, "after": after}))
            console.print(
                f"gold up by {(after.gold - before.gold) / spread:.2f} standard deviations of the "
                f"reference's texts"
            )


if __name__ == "__main__":
    main()
