"""The sequence reward model of this suite's grid: a small Llama whose value at the last word is
fitted to the score of Negation-v0's texts.

    python benchmarks/suite/attribution/prepare.py

It reads words in any order of the 64, so one model serves all seeds: the rule that scores texts is
the same for every `task_seed`, and what the seed draws is the reference that writes them. The model
learns from texts of the references of the seeds 0 to 9, as many of each, so that none of the grid's
runs begins off its data. Each text has one label, its score, at its end; whatever the model says of
unfinished texts it was never asked for.
"""

from pathlib import Path
from typing import Any

import gymnasium as gym
import torch

import tokenenv  # noqa: F401  (registers the ids)
from tokenenv.fit import FitConfig, fit
from tokenenv.fit.sample import sample

ENV = "tokenenv/Negation-v0"
SEEDS = range(10)
MODEL = Path("build") / "suite" / "attribution" / "model"
TEXTS, HELD_OUT = 800, 50
"""Of each seed, to learn from and to choose the epoch with."""
EPOCHS = 8


def texts_of(seed: int, count: int) -> list[dict[str, Any]]:
    """Return texts of a seed's reference with a value at their last word alone."""
    envs = gym.make_vec(ENV, 256, autoreset_mode="SameStep", task_seed=seed)
    return [
        {
            "prompt_ids": row["prompt_ids"],
            "response_ids": row["response_ids"],
            "values": [None] * (len(row["response_ids"]) - 1) + [row["score"]],
        }
        for row in sample(envs, "scores", count, seed=seed)
    ]


def fitted(folder: Path, texts: int = TEXTS, held_out: int = HELD_OUT, epochs: int = EPOCHS) -> Any:
    """Train the reward model and save it into a folder."""
    parts = [texts_of(seed, texts + held_out) for seed in SEEDS]
    return fit(
        FitConfig(
            data=[row for part in parts for row in part[held_out:]],
            held_out=[row for part in parts for row in part[:held_out]],
            out=folder,
            objective="value-labels",
            tokenizer=gym.make_vec(ENV, 1).unwrapped.token_spec.tokenizer,
            hidden_size=64,
            num_layers=2,
            lr=3e-3,
            epochs=epochs,
            batch_examples=64,
        ),
        progress=True,
    )


def main() -> None:
    torch.set_num_threads(1)
    if (MODEL / "config.json").exists():
        print(f"{MODEL} is there")
        return
    measures = fitted(MODEL).measures
    print(
        f"{MODEL}: correlation with the score of held-out texts "
        f"{measures['value_correlation']:.3f}, {measures['seconds']:.0f} seconds"
    )


if __name__ == "__main__":
    main()
