"""Token advantages in slime: a function for its `--custom-advantage-function-path`.

    python examples/export_slime.py episodes.jsonl

slime calls the function with `(args, rollout_data)` in the place of its own estimators, and takes
`rollout_data["advantages"]` and `rollout_data["returns"]`: a tensor (R,) for each text, R its
response tokens. The token rewards are found by the text's tokens. In a module of yours that slime
can import:

    token_advantages = TokenAdvantages(lambda: read_episodes("episodes.jsonl"))

and `--custom-advantage-function-path your_module.token_advantages`. slime's `kl_coef` is charged
token by token, as its PPO does. Checked with `compute_advantages_and_returns` of commit 624b824
(slime is not on PyPI).

What it leaves out: a training run, which needs GPUs; and context parallelism, under which a process
has a part of each text only.
"""

import sys

import torch

from tokenenv.agents.run.export import read_episodes


class TokenAdvantages:
    """A custom advantage function. `rows()` has to return the exported episodes of the batch."""

    def __init__(self, rows):
        self.rows = rows

    def __call__(self, args, rollout_data):
        """Leave each token's return-to-go, minus its mean over the batch, as the advantages."""
        rewards = {text_of(row): row["token_rewards"] for row in self.rows()}
        masks, returns = rollout_data["loss_masks"], []
        for tokens, kl, own in zip(rollout_data["tokens"], rollout_data["kl"], masks, strict=True):
            earned = torch.tensor(rewards[tuple(tokens.tolist())], device=kl.device)
            returns.append(to_go((earned - args.kl_coef * kl) * own))
        mean = torch.cat(returns)[torch.cat(masks).bool()].mean()
        rollout_data["returns"] = returns
        rollout_data["advantages"] = [
            (one - mean) * own for one, own in zip(returns, masks, strict=True)
        ]


def text_of(row):
    """Return a text's tokens, prompt and response."""
    return (*row["prompt_ids"], *row["response_ids"])


def to_go(rewards):
    """Return the sum (R,) of each token's reward and those after it."""
    return rewards.flip(0).cumsum(0).flip(0)


def rollout_data_of(rows):
    """Return what slime would hold of these texts, without a KL."""
    return {
        "tokens": [torch.tensor(text_of(row)) for row in rows],
        "loss_masks": [torch.tensor(row["own"]).int() for row in rows],
        "kl": [torch.zeros(len(row["own"])) for row in rows],
    }


def main(path):
    """Show what the trainer would be given."""
    rows = read_episodes(path)
    data = rollout_data_of(rows)
    TokenAdvantages(lambda: rows)(type("Arguments", (), {"kl_coef": 0.0}), data)
    print(f"{len(rows)} texts, advantages {[tuple(one.shape) for one in data['advantages'][:3]]}")


if __name__ == "__main__":
    main(sys.argv[1])
