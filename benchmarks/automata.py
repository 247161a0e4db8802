"""Tokens per second of the automaton environments, observation included, N = 256 texts on one core.

Every figure is the median of interleaved repetitions over whole texts of 64 tokens. The actions are
given, and texts begin anew within the step (SAME_STEP). Wanted: 500,000 tokens/s or more with the
environment's own defaults (`terminal` and the KL to the reference).
"""

from collections.abc import Callable

import gymnasium as gym
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from timing import medians

import tokenenv  # noqa: F401  (registers the ids)

N, T, TEXTS = 256, 64, 4
IDS = ("PlantedPhrase", "DelayedKey", "Brackets", "Negation")
VARIANTS: dict[str, dict[str, str]] = {
    "default": {},
    "torch arrays": {"array": "torch"},
    "oracle": {"reward": "oracle"},
    "features": {"observation": "features"},
}
console = Console()


def runner(name: str, **options: str) -> Callable[[], None]:
    """Return a call that steps N texts `TEXTS` times from beginning to end."""
    envs = gym.make_vec(
        f"tokenenv/{name}-v0", num_envs=N, max_new_tokens=T, autoreset_mode="SameStep", **options
    )
    actions = np.random.default_rng(0).integers(0, envs.single_action_space.n, (T * TEXTS, N))
    given = torch.from_numpy(actions) if options.get("array") == "torch" else actions
    envs.reset(seed=0)

    def run() -> None:
        for action in given:
            envs.step(action)

    return run


def main() -> None:
    """Print a row for each id, with a column for each variant."""
    torch.set_num_threads(1)
    table = Table("id", *VARIANTS, title=f"tokens/s, N = {N}, T = {T}, one core")
    found = {
        (name, variant): runner(name, **options)
        for name in IDS
        for variant, options in VARIANTS.items()
    }
    seconds = medians({f"{name} {variant}": run for (name, variant), run in found.items()}, 7)
    for name in IDS:
        rates = (N * T * TEXTS / seconds[f"{name} {variant}"] for variant in VARIANTS)
        table.add_row(name, *(f"{rate:,.0f}" for rate in rates))
    console.print(table)


if __name__ == "__main__":
    main()
