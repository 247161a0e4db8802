"""The cost of each reward design per token, relative to `terminal`, at three lengths.

Whole texts of random tokens are stepped to their end with the bundled models of PyDocs-v0, N = 32
texts, the designs in turn. Each figure is a median, and resets are not counted. `implicit` reads a
language model that shares the reward model's trunk, since a model of its own is one more forward by
definition. `oracle` and `process` are measured on ids that have what they need, against `terminal`
there.
"""

import argparse
import time
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import LlamaForCausalLM

import tokenenv  # noqa: F401  (registers the ids)
from tokenenv.envs.language.bundled import bundled_scorer
from tokenenv.rewards.designs import DESIGNS
from tokenenv.rewards.implicit import Implicit

N, LENGTHS = 32, (32, 64, 128)
PLACES = {"oracle": "tokenenv/DelayedKey-v0", "process": "tokenenv/Arithmetic-v0"}
"""The ids on which designs are measured that need something which PyDocs-v0 does not have."""
console = Console()


def shared_implicit() -> Implicit:
    """Make the design `implicit` with a language model on the reward model's own trunk, whose
    output layer is the input embeddings."""
    trunk = bundled_scorer("pydocs-reward", "cpu", torch.float32).model
    model = LlamaForCausalLM(trunk.config)
    model.model, model.lm_head.weight = trunk, trunk.embed_tokens.weight
    return Implicit(model.eval().requires_grad_(False))


def make_envs(design: str, env_id: str, length: int) -> gym.vector.VectorEnv:
    """Make an env of N texts of exactly `length` tokens, paid by the design."""
    reward: Any = shared_implicit() if design == "implicit" else design
    options = {} if env_id == PLACES["process"] else {"max_new_tokens": length}
    return gym.make_vec(env_id, num_envs=N, reward=reward, autoreset_mode="Disabled", **options)


def text_seconds(envs: gym.vector.VectorEnv) -> float:
    """Return the seconds per step of N whole texts."""
    spec, rng = envs.unwrapped.token_spec, np.random.default_rng(0)
    running = np.setdiff1d(np.arange(spec.vocab_size), spec.stop_token_ids)
    actions = rng.choice(running, (spec.max_new_tokens, N))
    envs.reset(seed=0)
    started = time.perf_counter()
    for action in actions:
        envs.step(action)
    return (time.perf_counter() - started) / len(actions)


def measure(designs: list[str], env_id: str, length: int, repetitions: int) -> dict[str, float]:
    """Return the median seconds per step of each design, the designs in turn."""
    envs = {design: make_envs(design, env_id, length) for design in ["terminal", *designs]}
    seconds: dict[str, list[float]] = {design: [] for design in envs}
    label = f"{env_id}, T = {length}"
    for repetition in track(range(repetitions + 1), label, console=console, transient=True):
        for design, env in envs.items():
            taken = text_seconds(env)
            # The first repetition is the warm-up.
            if repetition:
                seconds[design].append(taken)
    return {design: float(np.median(values)) for design, values in seconds.items()}


def main() -> None:
    """Print microseconds per token, and how many times those of `terminal` they are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=7)
    repetitions = parser.parse_args().repetitions
    here = [design for design in DESIGNS if design not in PLACES and design != "terminal"]
    found = {length: measure(here, "tokenenv/PyDocs-v0", length, repetitions) for length in LENGTHS}
    lengths = [f"T = {length}" for length in LENGTHS]
    title = "PyDocs-v0: microseconds per token (times terminal)"
    table = Table("design", *lengths, title=title)
    for design in ["terminal", *here]:
        cells = [(found[length][design], found[length]["terminal"]) for length in LENGTHS]
        table.add_row(design, *(f"{1e6 * one / N:.1f} ({one / base:.2f})" for one, base in cells))
    console.print(table)
    for design, env_id in PLACES.items():
        seconds = measure([design], env_id, LENGTHS[0], repetitions)
        ratio = seconds[design] / seconds["terminal"]
        console.print(f"{env_id}: {design} costs {ratio:.2f} times terminal")


if __name__ == "__main__":
    main()
