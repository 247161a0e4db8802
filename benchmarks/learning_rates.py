"""How far a learning rate moves a pretrained model, and its adapters.

    OMP_NUM_THREADS=1 python benchmarks/learning_rates.py --model FOLDER_OR_HUB_ID
    [--total-tokens 600]

PPO on a rule. For each rate it prints how far the first update moves the policy, in nats per token,
and how far the texts of the last update are from the model, in nats per text of 16 tokens.
"""

import argparse
from typing import Any

import gymnasium as gym

import tokenenv  # noqa: F401  (registers the ids)
from tokenenv.agents import PPO
from tokenenv.rewards import Rule

THINGS = ["soup", "room", "film", "week at work", "trip", "concert", "book", "phone"]
WORDS = ("good", "great", "happy", "love", "beautiful", "wonderful", "nice", "best")
RATES = {
    "all weights": ({}, [3e-4, 1e-5]),
    "LoRA, rank 16": ({"lora_rank": 16}, [1e-3, 2e-4]),
}


def happy(prompt: str, response: str) -> float:
    """Return how many of the words are in a text."""
    return float(sum(word in response for word in WORDS))


def make_envs(model: str) -> Any:
    """Make 16 texts of 16 tokens."""
    return gym.make_vec(
        "tokenenv/TextGen-v0",
        num_envs=16,
        model=model,
        prompts=[f"I want to say that the {thing} was" for thing in THINGS],
        reward=Rule(happy, dense=True),
        max_new_tokens=16,
    )


def run(model: str, lr: float, total_tokens: int, **settings: Any) -> list[dict[str, float]]:
    """Return the metrics of each update."""
    agent, metrics = PPO(make_envs(model), lr=lr, batch_tokens=256, seed=0, **settings), []
    agent.learn(total_tokens, on_update=lambda found, _: metrics.append(found))
    return metrics


def main() -> None:
    """Print a line a rate."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a folder or a hub id")
    parser.add_argument("--total-tokens", type=int, default=600)
    args = parser.parse_args()
    print(f"{'trained':15} {'lr':>6} {'first update, KL/token':>23} {'last texts, KL/text':>20}")
    for trained, (settings, rates) in RATES.items():
        for lr in rates:
            first, *_, last = run(args.model, lr, args.total_tokens, **settings)
            moved, away = first["policy/update_kl"], last["objective/kl"]
            print(f"{trained:15} {lr:>6.0e} {moved:>23.3f} {away:>20.1f}", flush=True)


if __name__ == "__main__":
    main()
