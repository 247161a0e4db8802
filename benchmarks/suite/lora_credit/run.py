"""Does LoRA degenerate intrinsic credit? The token log-ratio of a model that was tuned with all
weights, beside that of adapters of low rank.

    python benchmarks/suite/lora_credit/run.py

ARCA (arXiv 2606.00257) claims that under LoRA a policy stays so close to its reference that signals
made of the two outputs (surprisal, entropy reduction, and the policy divergence |log pi/pi_ref|)
degenerate once they are normalised within a text: the weights of its tokens become uniform, or
concentrate on a few that have nothing to do with the task. Its own signal is the adapters' residual
|h_adapted - h_base| in the last hidden state. By its abstract and its code the evidence is how
concentrated weights are, and scores of GRPO on MATH; no true credit is known there.

Here a small Llama that was trained on texts of Negation-v0's reference is tuned by DPO on 896 pairs
(128 more choose the epoch), with all weights or with adapters of rank 1, 4 and 16 at all linear
layers, at three learning rates. Over the tokens of 512 other texts of the reference:

- rho, rho*: Spearman's correlation of the log-ratio with the exact advantage of the reference, and
  with that of the optimum at beta 0.05;
- rho size: of |log-ratio| with the size of the reference's advantage; "rho residual" that of ARCA's
  residual, in the state that the token is chosen from;
- gini, effective: how concentrated |log-ratio| is within a text, as the paper's code has it: Gini's
  coefficient of the weights w, and 1 / (T sum w^2), which is 1 where they are uniform;
- nats: the mean |log-ratio| of a token;
- accuracy: the share of 512 other pairs whose better text has the higher sum.

A cell whose line is in results/results.csv is not run again.
"""

import sys
import tempfile
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from fit_reward import World, accuracy, language_model, rewards_of, rho, rows_for, world_of
from tidy import Row, fill, print_table

from tokenenv.fit import FitConfig, fit
from tokenenv.fit.measure import spearman
from tokenenv.fit.reading import place_states
from tokenenv.models.trunks import trunk_of

RESULTS = Path(__file__).parent / "results" / "results.csv"
BUILD = Path("build") / "suite" / "lora_credit"
ENV, PAIRS, EPOCHS = "Negation-v0", 1024, 4
COEF = 0.1
"""DPO's beta."""
TRAINED = {"all weights": 0, "LoRA, rank 1": 1, "LoRA, rank 4": 4, "LoRA, rank 16": 16}
RATES = (1e-3, 3e-3, 1e-2)
SEEDS = range(5)


@cache
def world(seed: int) -> World:
    """Return the pairs, the texts and their advantages of a seed, with a language model in its
    folder."""
    folder = BUILD / str(seed)
    folder.mkdir(parents=True, exist_ok=True)
    made = world_of(ENV, seed, PAIRS, 0, folder, folder)
    if not (folder / "lm" / "config.json").exists():
        language_model(made)
    return made


def measured(setting: Row) -> dict[str, float]:
    """Tune a model and return its figures."""
    data = world(setting["seed"])
    rows, held_out = rows_for("dpo", data, PAIRS)
    base = str(data.folder / "lm")
    with tempfile.TemporaryDirectory() as folder:
        config = FitConfig(
            data=rows,
            held_out=held_out,
            out=Path(folder) / "model",
            objective="dpo",
            model=base,
            coef=COEF,
            lora_rank=TRAINED[setting["trained"]],
            lr=setting["lr"],
            epochs=EPOCHS,
            patience=EPOCHS,
            seed=setting["seed"],
        )
        reader = fit(config).reader
    ratios = [row / COEF for row in rewards_of(reader, data.texts)]
    sizes = [np.abs(row) for row in data.advantages["reference"]]
    moved = residuals(reader.model, AutoModelForCausalLM.from_pretrained(base).eval(), data)
    concentration = np.mean([concentrated(np.abs(row)) for row in ratios], axis=0)
    return {
        "weights": sum(weight.numel() for weight in reader.trained().values()),
        "rho": rho(data, ratios, "reference"),
        "rho*": rho(data, ratios, "optimal"),
        "rho size": spearman([np.abs(row) for row in ratios], sizes)[0],
        "rho residual": spearman(moved, sizes)[0],
        "gini": float(concentration[0]),
        "effective": float(concentration[1]),
        "nats": float(np.abs(np.concatenate(ratios)).mean()),
        "accuracy": accuracy(reader, data.others),
    }


@torch.no_grad()
def residuals(model: object, base: object, data: World) -> list[np.ndarray]:
    """Return |h - h_base| (R,) of the states that each text's tokens are chosen from."""
    states, others = (place_states(trunk_of(one), data.texts) for one in (model, base))
    norms = (states - others).norm(dim=1).numpy()
    ends = np.cumsum([len(text.response) + 1 for text in data.texts])
    return [row[:-1] for row in np.split(norms, ends[:-1])]


def concentrated(weights: np.ndarray) -> tuple[float, float]:
    """Return Gini's coefficient of weights (T,), 0 or more, and 1 / (T sum w^2) of them as
    shares."""
    count, shares = len(weights), np.sort(weights) / weights.sum()
    gini = float((2 * np.arange(1, count + 1) - count - 1) @ shares) / count
    return gini, float(1 / (count * (shares @ shares)))


def main() -> None:
    torch.set_num_threads(1)
    settings = [
        {"seed": seed, "trained": trained, "lr": rate}
        for seed, trained, rate in product(SEEDS, TRAINED, RATES)
    ]
    rows = fill(RESULTS, settings, measured)
    rows.sort(key=lambda row: (list(TRAINED).index(row["trained"]), row["lr"]))
    by = ["trained", "weights", "lr"]
    figures = {name: 2 for name in rows[0] if name not in (*by, "seed")}
    print_table(rows, by, figures, "DPO's token log-ratio on Negation-v0")


if __name__ == "__main__":
    main()
