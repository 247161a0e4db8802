"""What it costs to write texts step by step, beside `generate` of transformers.

    OMP_NUM_THREADS=1 python benchmarks/stepping.py --model FOLDER_OR_HUB_ID
    [--texts 8 32] [--tokens 32] [--repetitions 5]

Each candidate samples the same number of tokens after the same prompts, the prompts' forward
included, in one process and in turns. Seconds are those of the process on the CPU, so that whatever
else the machine does changes little. "step" is the env alone, with a Python rule as reward: the
reference reads each token. "act + step" has the policy beside it, which is a second model.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from timing import medians

import tokenenv  # noqa: F401  (registers the ids)
from tokenenv.agents import Reference

THINGS = ["bridges", "bread", "rivers", "bicycles", "glass", "clocks", "rain", "markets"]


def length(prompt: str, response: str) -> float:
    """Return the number of words: a rule that costs nothing."""
    return float(len(response.split()))


def make_envs(model: str, texts: int, tokens: int) -> Any:
    """Make N texts of T tokens each: an id that is nearly never drawn is the only one that ends a
    text."""
    return gym.make_vec(
        "tokenenv/TextGen-v0",
        num_envs=texts,
        model=model,
        prompts=[f"Tell me what you know about {thing}, in a few words." for thing in THINGS],
        reward=length,
        max_new_tokens=tokens,
        stop_token_ids=[1],
    )


def stepping(envs: Any, tokens: int, act: Callable[[Any], Any]) -> Callable[[], None]:
    """Return a function that writes N texts of T tokens through the env, with what `act` makes of
    an observation."""

    def run() -> None:
        obs, _ = envs.reset(seed=0)
        for _ in range(tokens):
            obs, *_ = envs.step(act(obs))

    return run


def generating(envs: Any, tokens: int) -> Callable[[], None]:
    """Return a function that has `generate` sample as many tokens after the same prompts."""
    obs, _ = envs.reset(seed=0)
    model, longest = envs.unwrapped.reference, int(obs["length"].max())
    ids = torch.zeros(envs.num_envs, longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (text, size) in enumerate(zip(obs["tokens"], obs["length"], strict=True)):
        ids[row, longest - size :] = torch.as_tensor(text[:size])
        mask[row, longest - size :] = 1
    lengths = {"min_new_tokens": tokens, "max_new_tokens": tokens, "pad_token_id": 0}

    def run() -> None:
        model.generate(
            ids, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, **lengths
        )

    return run


def main() -> None:
    """Print tokens per CPU-second of each, and its share of what `generate` writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a folder or a hub id")
    parser.add_argument("--texts", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    print(f"{'N':>4} {'':12} {'tokens/CPU-s':>12} {'of generate':>12}")
    for texts in args.texts:
        envs = make_envs(args.model, texts, args.tokens)
        same = np.full(texts, 100)
        seconds = medians(
            {
                "generate": generating(envs, args.tokens),
                "step": stepping(envs, args.tokens, lambda obs, same=same: same),
                "act + step": stepping(envs, args.tokens, Reference(envs).act),
            },
            args.repetitions,
            time.process_time,
        )
        for name, each in seconds.items():
            speed, share = texts * args.tokens / each, seconds["generate"] / each
            print(f"{texts:>4} {name:12} {speed:>12.1f} {share:>12.2f}", flush=True)


if __name__ == "__main__":
    main()
