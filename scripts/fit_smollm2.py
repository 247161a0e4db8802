"""A token reward model on a real pretrained trunk, from sequence labels alone.

    make fit-real, or: python scripts/fit_smollm2.py --model build/real/smollm2

SmolLM2-135M-Instruct answers neutral questions twice. VADER's sentiment of the whole answers says
which is better; no token has a label. From these pairs two reward models are trained: one by LoRA,
one as a head on the frozen trunk, whose states are computed once. Both are measured on answers to
questions that neither has seen: the share of pairs told apart, and Spearman's correlation of the
token rewards with what each token changes in VADER's sentiment of the answer so far.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from vader import polarity_scores

import tokenenv  # noqa: F401  (registers the ids)
from tokenenv.fit import FitConfig, fit
from tokenenv.fit.examples import Text
from tokenenv.fit.measure import spearman
from tokenenv.fit.sample import sample

THINGS = "bridges|tables|libraries|bread|rivers|bicycles|glass|clocks|rain|markets|paper|roads|salt"
THINGS += "|windows|wool|maps|coffee|gardens|trains|stairs|soap|lamps|ships|chairs|museums|rice"
THINGS += "|hills|cars|wood|calendars|snow|shops|ink|streets|sugar|doors|cotton|compasses"
HELD_OUT = 10
"""Things that are asked about only to measure."""
console = Console()


def sentiment(prompt: str, response: str) -> float:
    """Return VADER's sentiment of an answer, -1 to 1; 0 is neutral."""
    return polarity_scores(response)["compound"]


def pairs(model: str, things: Sequence[str], count: int, tokens: int, seed: int) -> list[Any]:
    """Return pairs of answers, the one that VADER likes better first."""
    envs = gym.make_vec(
        "tokenenv/TextGen-v0",
        num_envs=32,
        model=model,
        chat_template=True,
        prompts=[f"What do you think about {thing}?" for thing in things],
        max_new_tokens=tokens,
        reward=sentiment,
        gold=sentiment,
        autoreset_mode="SameStep",
    )
    with Progress(console=console) as progress:
        bar = progress.add_task("answers", total=count)
        return sample(
            envs,
            "ranking",
            count,
            seed=seed,
            on_text=lambda done, total: progress.update(bar, completed=done),
        )


def answers(rows: Sequence[Any]) -> list[Text]:
    """Return the answers of some pairs, better and worse in turns."""
    return [
        Text(*(np.asarray(row[key], dtype=np.int64) for key in ("prompt_ids", f"{name}_ids")))
        for row in rows
        for name in ("chosen", "rejected")
    ]


def changes(text: Text, tokenizer: Any) -> np.ndarray:
    """Return what each token changes in VADER's sentiment of the answer so far, (R,)."""
    beginnings = [text.response[:end] for end in range(len(text.response) + 1)]
    read = tokenizer.batch_decode(beginnings, skip_special_tokens=True)
    return np.diff([polarity_scores(one)["compound"] for one in read])


def row(name: str, found: Any, seconds: float, texts: Sequence[Text]) -> tuple[str, ...]:
    """Return what a model is worth, as a row of the table."""
    with torch.no_grad():
        reward = found.reader.read(texts).reward_BR.numpy()
    rewards = [one[: len(text.response)] for one, text in zip(reward, texts, strict=True)]
    totals = np.array([one.sum() for one in rewards])
    known = [changes(text, found.reader.tokenizer) for text in texts]
    # Most tokens say nothing to VADER; those that do are looked at by themselves too.
    loud = [np.where(change == 0, np.nan, change) for change in known]
    accuracy = float(np.mean(totals[::2] > totals[1::2]))
    error = (accuracy * (1 - accuracy) / (len(texts) // 2)) ** 0.5
    return (
        name,
        f"{accuracy:.3f} ± {error:.3f}",
        f"{spearman(rewards, known)[0]:.3f}",
        f"{spearman(rewards, loud)[0]:.3f}",
        f"{found.measures['tokens']:,.0f}",
        f"{seconds:.0f}",
    )


def main() -> None:
    """Sample, train two models, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="build/real/smollm2")
    parser.add_argument("--pairs", type=int, default=224)
    parser.add_argument("--held-out-pairs", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=24, help="of an answer, at the most")
    parser.add_argument("--out", type=Path, default=Path("runs/vader-reward"))
    args = parser.parse_args()
    start = time.perf_counter()
    data = pairs(args.model, THINGS.split("|")[HELD_OUT:], args.pairs, args.tokens, seed=0)
    texts = answers(
        pairs(args.model, THINGS.split("|")[:HELD_OUT], args.held_out_pairs, args.tokens, seed=1)
    )
    console.print(f"answers: {time.perf_counter() - start:.0f} s")
    table = Table("model", "pairs told apart", "rho", "rho where VADER hears", "tokens", "seconds")
    settings: dict[str, dict[str, Any]] = {
        "LoRA": {"lora_rank": 8, "lr": 5e-4, "epochs": 2},
        "frozen trunk": {"freeze": True, "lr": 1e-2, "epochs": 30, "patience": 5},
    }
    for name, options in settings.items():
        begin = time.perf_counter()
        config = FitConfig(
            data=data,
            model=args.model,
            objective="bt-sum",
            out=args.out / name.lower().replace(" ", "-"),
            batch_examples=16,
            **options,
        )
        found = fit(config, progress=True)
        table.add_row(*row(name, found, time.perf_counter() - begin, texts))
    console.print(table)


if __name__ == "__main__":
    main()
