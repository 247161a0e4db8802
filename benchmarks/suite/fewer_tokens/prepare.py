"""Fit the reward models that fewer_tokens/grid.yaml reads, into build/suite/fewer_tokens.

    .venv/bin/python -m benchmarks.suite.fewer_tokens.prepare

All learn from the same 2,048 pairs of the reference's texts on Negation-v0 (`task_seed` 0), and all
have the units of the score. What they cost is printed, in texts and in tokens that were read.
"""

import shutil
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.fit_reward import World, fitted, language_model, world_of

FOLDER = Path("build/suite/fewer_tokens")
PAIRS = 2048
OBJECTIVES = ("score-every", "score-value", "value-labels", "a-star")


def main() -> None:
    """Sample the pairs, and fit a model for each objective."""
    torch.set_num_threads(1)
    console = Console()
    FOLDER.mkdir(parents=True, exist_ok=True)
    world: World = world_of("Negation-v0", 0, PAIRS, 0, FOLDER, FOLDER / "results.jsonl")
    for name in OBJECTIVES:
        shutil.rmtree(FOLDER / f"{name}-{PAIRS}", ignore_errors=True)
        lm = language_model(world) if name == "a-star" else None
        found = fitted(name, world, PAIRS, lm, None)
        console.print(f"{found.folder}: {int(found.measures['tokens']):,} tokens read")


if __name__ == "__main__":
    main()
