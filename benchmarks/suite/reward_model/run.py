"""Learning rate and batch size of token reward models: how much training well is worth.

    python benchmarks/suite/reward_model/run.py

Papers on token reward models keep the learning rate and the batch size of their sequence reward
model, and no sweep of them has been published. Here every cell trains a new Llama of two layers on
the same 896 pairs of Negation-v0 (128 more choose the epoch), ranked by the gold score, or on the
scores of the same texts; it sees each example `EPOCHS` times whatever the batch is, so that a small
batch means more steps. A batch counts pairs for "bt-sum" and "bt-mean", texts for "score-every".

- rho: Spearman's correlation of token rewards with the exact advantage of the reference, over the
  tokens of 512 other texts;
- accuracy: the share of 512 other pairs whose better text has the higher sum of rewards;
- seconds: of the process, on one thread; model and data are made in them too.

A cell whose line is in results/results.csv is not run again.
"""

import sys
import tempfile
import time
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from fit_reward import World, accuracy, rewards_of, rho, rows_for, world_of
from rich.table import Table
from tidy import Row, console, fill, text_of

from tokenenv.fit import FitConfig, fit

RESULTS = Path(__file__).parent / "results" / "results.csv"
ENV, PAIRS, EPOCHS = "Negation-v0", 1024, 3
OBJECTIVES = ("bt-sum", "bt-mean", "score-every")
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
BATCHES = (8, 32, 128)
SEEDS = range(3)


@cache
def world(seed: int) -> World:
    """Return the pairs, the texts and their advantages of a seed."""
    return world_of(ENV, seed, PAIRS, 0, Path(), Path())


def measured(setting: Row) -> dict[str, float]:
    """Train a model and return its figures."""
    data, objective = world(setting["seed"]), setting["objective"]
    rows, held_out = rows_for(objective, data, PAIRS)
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        reader = fit(config(setting, rows, held_out, Path(folder), data)).reader
        seconds = time.process_time() - started
    return {
        "rho": rho(data, rewards_of(reader, data.texts), "reference"),
        "accuracy": accuracy(reader, data.others),
        "seconds": seconds,
    }


def config(
    setting: Row, rows: list[Row], held_out: list[Row], folder: Path, data: World
) -> FitConfig:
    """Return the settings of a cell: none ends early, so that all see as many examples."""
    spec: Any = data.make(1).unwrapped.token_spec
    return FitConfig(
        data=rows,
        held_out=held_out,
        out=folder / "model",
        objective=setting["objective"],
        tokenizer=spec.tokenizer,
        hidden_size=64,
        num_layers=2,
        lr=setting["lr"],
        batch_examples=setting["batch"],
        epochs=EPOCHS,
        patience=EPOCHS,
        seed=setting["seed"],
    )


def table(rows: list[Row], figure: str, digits: int = 2) -> Table:
    """Return the table of a figure: a line for each objective and batch, a column for each
    rate."""
    seeds = len({row["seed"] for row in rows})
    title = f"{figure} ({seeds} seeds; mean and 95% bootstrap interval)"
    made = Table("objective", "batch", *(f"lr {rate:g}" for rate in RATES), title=title)
    for objective, batch in product(OBJECTIVES, BATCHES):
        some = [row for row in rows if (row["objective"], row["batch"]) == (objective, batch)]
        cells = [text_of((r[figure] for r in some if r["lr"] == rate), digits) for rate in RATES]
        made.add_row(objective, str(batch), *cells)
    return made


def main() -> None:
    torch.set_num_threads(1)
    names = ("seed", "objective", "lr", "batch")
    settings = [
        dict(zip(names, values, strict=True))
        for values in product(SEEDS, OBJECTIVES, RATES, BATCHES)
    ]
    rows = fill(RESULTS, settings, measured)
    for figure, digits in (("rho", 2), ("accuracy", 2), ("seconds", 1)):
        console.print(table(rows, figure, digits))


if __name__ == "__main__":
    main()
