"""What it costs to read tokens that an environment wrote into running texts.

    python benchmarks/turns_cache.py [--slots 16] [--rows 4] [--length 256] [--repetitions 7]

It prints milliseconds (medians of interleaved repetitions) for a Llama of 26 million parameters:
first of the cache (one extension, as many single steps, the whole texts read again), then of an
actor's step with and without written tokens.
"""

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from timing import medians
from transformers import LlamaConfig, LlamaForCausalLM

from tokenenv.agents import LMPolicy
from tokenenv.agents.rollout.actor import Actor
from tokenenv.models.cached_lm import CachedLM

WRITTEN = (1, 4, 16, 64)
"""How many tokens a reply has."""
VOCAB_SIZE = 1024


def mid_size(length: int, device: str) -> Any:
    """Make a Llama of 8 layers, hidden 512, 8 heads of 64, with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=length,
    )
    return LlamaForCausalLM(config).to(device).eval().requires_grad_(False)


def waited(run: Callable[[], object], device: str) -> Callable[[], None]:
    """Make a call end when the device has done its work."""

    def call() -> None:
        run()
        if device == "cuda":
            torch.cuda.synchronize()

    return call


def of_the_cache(
    trunk: Any, slots: int, rows: int, length: int, written: int, device: str
) -> dict[str, Callable[[], object]]:
    """Return three ways to put `written` tokens behind `rows` texts of `length` tokens."""
    cached = CachedLM(trunk, slots, length + written)
    texts = torch.randint(0, VOCAB_SIZE, (slots, length + written), device=device)
    cached.prefill(range(slots), texts, [length] * slots)
    which, new = np.arange(rows), texts[:rows, length:]
    active = np.arange(slots) < rows

    def from_the_start_of_the_reply(run: Callable[[], object]) -> Callable[[], object]:
        def call() -> None:
            cached.positions[:] = length
            run()

        return waited(call, device)

    def single() -> None:
        for t in range(written):
            cached.append(texts[:, length + t], active)

    calls: dict[str, Callable[[], object]] = {
        "extend": lambda: cached.extend(which, new, [written] * rows),
        "single steps": single,
        "whole texts": lambda: cached.prefill(which, texts[:rows], [length + written] * rows),
    }
    return {name: from_the_start_of_the_reply(call) for name, call in calls.items()}


def of_an_actor(
    model: Any, slots: int, rows: int, length: int, written: int, device: str
) -> dict[str, Callable[[], object]]:
    """Return an actor's step where no token was written, where `written` were in `rows` texts, and
    where these texts are read from their start."""
    actor, ids = Actor(LMPolicy(model)), torch.arange(slots, device=device)
    texts = torch.randint(0, VOCAB_SIZE, (slots, length + written + 2), device=device)
    lengths = torch.full((slots,), length, device=device)
    longer = lengths + written * (ids < rows)

    def obs(lengths: torch.Tensor) -> dict[str, torch.Tensor]:
        places = torch.arange(texts.shape[1], device=device)
        return {"tokens": texts * (places < lengths[:, None]), "length": lengths}

    actor.act(obs(lengths - 1))
    before, after, replied = obs(lengths - 1), obs(lengths), obs(longer)

    def act(observation: dict[str, torch.Tensor], start_anew: bool = False) -> Callable[[], object]:
        def call() -> None:
            # The actor and its cache go back to the moment before the step.
            actor._slots.positions[:] = length - 1
            actor._expect(before["tokens"], before["length"], texts[:, length - 1])
            if start_anew:
                actor._texts[:rows] = -1
            actor.act(observation)

        return waited(call, device)

    return {
        "nothing written": act(after),
        "written": act(replied),
        "whole texts": act(replied, start_anew=True),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--rows", type=int, default=4, help="texts that are written into")
    parser.add_argument("--length", type=int, default=256, help="tokens of each text before that")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    sizes = args.slots, args.rows, args.length
    model = mid_size(args.length + max(WRITTEN) + 2, args.device)
    print(f"{args.slots} slots, {args.rows} texts of {args.length} tokens are written into")
    for title, what, ways in (
        ("cache", model.model, of_the_cache),
        ("actor", model, of_an_actor),
    ):
        for written in WRITTEN:
            found = medians(ways(what, *sizes, written, args.device), args.repetitions)
            parts = ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in found.items())
            print(f"{title}, {written:2d} written: {parts}")


if __name__ == "__main__":
    main()
