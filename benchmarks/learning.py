"""What the bundled PPO learns, with three seeds each, on held-out prompts: gold, KL, length,
distinct bigrams.

Wanted on Reviews-v0: 0.9 or more of the reviews positive within 150,000 tokens. Wanted on
PyDocs-v0: Flesch reading ease up by one standard deviation of the reference's texts, at 20 nats of
KL per text or less.
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
    """Return the held-out evaluations before and after one run with the command line's defaults."""
    train = Train(env=env)
    held_out = train.make_envs(split="test")
    agent = PPO(train.make_envs(), train.agent, seed=seed)
    before = evaluate(agent, held_out, num_texts=texts)
    agent.learn(total_tokens, progress=True)
    return before, evaluate(agent, held_out, num_texts=texts)


def main() -> None:
    """Run what is asked for, and print a table and a verdict for each seed."""
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
            up = (after.gold - before.gold) / spread
            console.print(f"gold up by {up:.2f} standard deviations of the reference's texts")


if __name__ == "__main__":
    main()
