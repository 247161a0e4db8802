"""First-order attribution against exact credit: how the tokens that a design pays stand to their
exact advantage.

    python benchmarks/suite/attribution/prepare.py
    python benchmarks/suite/attribution/run.py

P2T ("Unlocking Token Rewards via Training-Free Reward Attribution", CVPR 2026) pays a token what
the reward model's score would lose if the token's embedding were that of a word without meaning, to
first order: r_t = (e_t - e_null) . d score / d e_t, in one forward and one backward; it claims
about four times faster convergence than the outcome reward. "first order" is that formula, with a
word of Negation-v0 that never changes the score as e_null, and what the sum lacks to the score on
the last token, as the other designs have it; "gradient" are integrated gradients. All designs but
"oracle" place the score of the model that prepare.py fits.

The texts are the reference's, which every policy starts as, so the exact advantage is Q - V of the
reference under the true score. For each design and seed (the reference is the seed's), over the
tokens of 64 texts:

- credit: the correlation of reward-to-go, less its mean at the position, with the exact advantage:
  what a learner without a critic and with lambda 1 sees;
- reward: that of the token's own reward, what one sees that looks no further (lambda 0);
- rho: Spearman's correlation of the token's own reward.

Correlations are Pearson's where nothing is said.
"""

import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from prepare import ENV, MODEL, SEEDS
from tidy import Row, console, print_table, write

from tokenenv.fit.advantages import exact_advantages
from tokenenv.fit.examples import Text
from tokenenv.fit.measure import correlation, spearman
from tokenenv.fit.sample import sample
from tokenenv.rewards import Gradient
from tokenenv.rewards.designs import Design
from tokenenv.rewards.redistribute import at_places
from tokenenv.rewards.seen import FinishedTexts

RESULTS = Path(__file__).parent / "results" / "credit.csv"
TEXTS = 64
NULL = "w1"
"""A word that changes no score."""


class FirstOrder(Gradient):
    """P2T's reward: the first-order estimate of what a token's place is worth, beside a word
    without meaning."""

    name = "first order"

    def __init__(self, null: int) -> None:
        super().__init__(steps=1)
        self.null = null

    def _attributions(self, texts: FinishedTexts, max_new_tokens: int, change: Tensor) -> Tensor:
        rows = np.arange(len(texts.ids))
        moving, inputs = self._on_line(texts, rows, np.ones(len(rows), dtype=np.float32))
        away = moving - self._trunk.get_input_embeddings().weight[self.null].detach()
        with torch.enable_grad():
            inputs = inputs.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self._scores(inputs, texts, rows).sum(), inputs)
        placed = at_places((slope * away).sum(-1).detach(), texts.positions(max_new_tokens))
        return torch.where(texts.own_mask(max_new_tokens), placed, 0.0)


def designs_of(tokenizer: Any) -> dict[str, Design]:
    """Return the designs by name."""
    names = (
        "terminal",
        "uniform",
        "gradient",
        "attention",
        "occlusion",
        "shapley",
        "delta",
        "oracle",
    )
    null = tokenizer.convert_tokens_to_ids(NULL)
    return {**{name: name for name in names}, "first order": FirstOrder(null)}


def measured(seed: int, model: Any, texts: int = TEXTS) -> list[Row]:
    """Return a line for each design with a reward model, which may be a folder's path."""
    options = {"autoreset_mode": "SameStep", "task_seed": seed}
    plain = gym.make_vec(ENV, 256, **options)
    rows = sample(plain, "scores", texts, seed=1000 + seed)
    pairs = [row["prompt_ids"] for row in rows], [row["response_ids"] for row in rows]
    read = [Text(*(np.asarray(ids) for ids in pair)) for pair in zip(*pairs, strict=True)]
    exact = np.stack(exact_advantages(plain, read, "reference"))
    found = []
    for name, design in designs_of(plain.unwrapped.token_spec.tokenizer).items():
        envs = gym.make_vec(ENV, 1, reward={"placed": design}, reward_model=model, **options)
        paid = envs.unwrapped.score_episodes(*pairs).token_reward_terms["placed"].astype(np.float64)
        to_go = paid[:, ::-1].cumsum(1)[:, ::-1]
        credit = to_go - to_go.mean(0)
        found.append(
            {
                "design": name,
                "seed": seed,
                "credit": correlation(credit.ravel(), exact.ravel()),
                "reward": correlation(paid.ravel(), exact.ravel()),
                "rho": spearman(paid, exact)[0],
            }
        )
    return found


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for seed in SEEDS:
        console.print(f"seed {seed}")
        rows += measured(seed, str(MODEL))
    names = [row["design"] for row in rows]
    rows.sort(key=lambda row: names.index(row["design"]))
    write(RESULTS, rows)
    figures = {"credit": 2, "reward": 2, "rho": 2}
    print_table(rows, ["design"], figures, "Paid tokens and their exact advantage, Negation-v0")


if __name__ == "__main__":
    main()
