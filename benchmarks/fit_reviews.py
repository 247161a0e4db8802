"""Tokens until PPO writes 90% positive reviews on Reviews-v0: the bundled reward model, which the
grammar's own values taught, against a token reward model fitted from preference pairs alone.

The pairs are texts of the reference, ranked by the gold metric; `bt-sum` trains the reference's own
trunk on them. The fitted model's logits have another unit, so its weight makes the sums over texts
of the reference vary as much as the bundled model's. Everything else is PPO's default. Gold is that
of 256 held-out texts, measured about every 4,000 tokens.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import gymnasium as gym
from rich.console import Console
from rich.table import Table

import tokenenv  # noqa: F401  (registers the ids)
from tokenenv.agents import PPO
from tokenenv.agents.run.evaluate import evaluate
from tokenenv.envs.language.bundled import ASSETS
from tokenenv.fit import FitConfig, fit
from tokenenv.fit.sample import sample

GOAL, EVERY = 0.9, 4_000
console = Console()


def make(num_envs: int = 64, **options: Any) -> Any:
    """Make the vector env."""
    return gym.make_vec("tokenenv/Reviews-v0", num_envs, autoreset_mode="SameStep", **options)


def fitted(pairs: int, folder: Path) -> dict[str, float]:
    """Fit a reward model; return what it is worth on held-out pairs."""
    rows = sample(make(128), "ranking", pairs, seed=0)
    model = str(ASSETS / "reviews-lm")
    config = FitConfig(data=rows, objective="bt-sum", model=model, out=folder, lr=1e-3, epochs=8)
    return fit(config, progress=True).measures


def spread(rows: list[Any], **options: Any) -> float:
    """Return the standard deviation of the sums of token rewards over some texts."""
    prompts, responses = ([row[f"{name}_ids"] for row in rows] for name in ("prompt", "response"))
    return float(make(1, **options).unwrapped.score_episodes(prompts, responses).score.std())


def curve(reward: Any, seed: int, total: int, **options: Any) -> list[tuple[int, float]]:
    """Return gold after so many tokens, measured several times."""
    agent = PPO(make(reward=reward, **options), seed=seed)
    held_out, points = make(split="test"), []

    def measure(metrics: Any, episodes: Any) -> None:
        if agent.tokens_seen - (points[-1][0] if points else 0) >= EVERY:
            found = evaluate(agent, held_out, num_texts=256, seed=seed)
            points.append((agent.tokens_seen, found.gold))

    agent.learn(total, on_update=measure)
    return points


def main() -> None:
    """Fit, train with both models, and print when each got there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=4096)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--total-tokens", type=int, default=40_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "reward"
        console.print(fitted(args.pairs, folder))
        texts = sample(make(), "texts", 512, seed=1)
        given = {"reward_model": str(folder)}
        weight = spread(texts) / spread(texts, **given)
        table = Table("reward model", "seed", f"tokens to {GOAL}", "gold after so many tokens")
        designs: dict[str, tuple[Any, dict[str, Any]]] = {
            "bundled": ("token", {}),
            "fitted": ({"fitted": ("token", weight)}, given),
        }
        for seed in args.seeds:
            for name, (reward, options) in designs.items():
                points = curve(reward, seed, args.total_tokens, **options)
                reached = next((tokens for tokens, gold in points if gold >= GOAL), None)
                shown = " ".join(f"{tokens / 1000:.0f}k:{gold:.2f}" for tokens, gold in points)
                table.add_row(name, str(seed), f"{reached:,}" if reached else "never", shown)
                console.print(name, seed, reached, shown, highlight=False)
        console.print(table, f"weight of the fitted model {weight:.2f}")


if __name__ == "__main__":
    main()
