"""How far one learning rate moves a pretrained model, and another its adapters.

    OMP_NUM_THREADS=1 python benchmarks/learning_rates.py --model FOLDER_OR_HUB_ID
    [--total-tokens 1500]

PPO on a rule. For each rate it prints the KL per token of the first update, and of the last texts
the KL to the model itself, in nats per text, the score and the distinct bigrams.
"""

import argparse
from typing import Any

import gymnasium as gym

import tokenenv  # noqa: F401  (registers the ids)
from tokenenv.agents import PPO
from tokenenv.agents.run.evaluate import evaluate
from tokenenv.rewards import Rule

THINGS = ["soup", "room", "film", "week at work", "trip", "concert", "book", "phone"]
WORDS = ("good", "great", "happy", "love", "beautiful", "wonderful", "nice", "best")
RATES = {
    "all weights": ({}, [3e-4, 1e-4, 1e-5]),
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


def run(model: str, lr: float, total_tokens: int, **settings: Any) -> tuple[float, Any]:
    """Return the KL per token of the first update, and the figures of texts after the last."""
    agent, moved = PPO(make_envs(model), lr=lr, batch_tokens=256, seed=0, **settings), []
    agent.learn(total_tokens, on_update=lambda metrics, _: moved.append(metrics))
    return moved[0]["policy/update_kl"], evaluate(agent, make_envs(model), num_texts=32)


def main() -> None:
    """Print a line a rate."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a folder or a hub id")
    parser.add_argument("--total-tokens", type=int, default=1500)
    args = parser.parse_args()
    print(
        f"{'trained':15} {'lr':>6} {'first update':>13} {'KL/text':>9} {'score':>6} {'bigrams':>7}"
    )
    for trained, (settings, rates) in RATES.items():
        for lr in rates:
            first, found = run(args.model, lr, args.total_tokens, **settings)
            print(
                f"{trained:15} {lr:>6.0e} {first:>13.3f} {found.kl:>9.1f} {found.score:>6.2f} "
                f"{found.distinct_bigrams:>7.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
