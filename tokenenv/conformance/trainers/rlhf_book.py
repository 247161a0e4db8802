"""The code of the RLHF book (github.com/natolambert/rlhf-book, `code/policy_gradients`): GAE, group
advantages, losses and KL terms. Tried with commit a66b0bf (21 August 2026)."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tokenenv.conformance.batches import Batch
from tokenenv.conformance.sources import functions_of
from tokenenv.conformance.subjects import Subject

GROUPS = {
    "rloo": "compute_loo_advantages",
    "grpo": "compute_standardized_advantages",
    "dr. grpo": "compute_nonstandardized_advantages",
}
CLIP = {"clip_eps_lo": 0.2, "clip_eps_hi": 0.2}
LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "reinforce loss": ("ReinforceLoss", {}),
    "grpo loss": ("GRPOLoss", CLIP | {"beta": 0.0, "kl_estimator": "kl3"}),
    "dapo loss": ("DAPOLoss", CLIP),
}


def subjects(root: Path) -> list[Subject]:
    """Return the book's functions. They take one number a text; the KL penalty, which the book
    averages over a text's tokens, is summed here as in what is optimised."""
    losses = functions_of(root / "code/policy_gradients/loss.py", nn=torch.nn)
    utils = functions_of(root / "code/policy_gradients/utils.py")

    def gae(b: Batch) -> Tensor:
        rewards = b.penalised.sum(1, keepdim=True).float()
        return utils.compute_gae(rewards, b.mask.long(), b.values, 1.0, b.lambda_)

    return [
        Subject("gae", "advantages", gae),
        *(Subject(name, "groups", _grouped(getattr(utils, f))) for name, f in GROUPS.items()),
        *(Subject(name, "loss", _loss(losses, *how)) for name, how in LOSSES.items()),
        *(Subject(f"KL, {name}", "kl", _kl(losses, name)) for name in ("kl1", "kl2", "kl3")),
    ]


def _grouped(function: Any) -> Any:
    """The function takes one prompt's rewards (K, 1); here a column for each group."""

    def advantages(b: Batch) -> Tensor:
        columns = b.penalised.sum(1).view(-1, b.group_size).T
        return function(columns).T.reshape(-1, 1).expand(b.mask.shape)

    return advantages


def _loss(losses: Any, name: str, settings: dict[str, Any]) -> Any:
    module = getattr(losses, name)(**settings)

    def loss(b: Batch) -> Tensor:
        experience = SimpleNamespace(
            log_probs_old=b.old_logprobs, advantages=b.advantages, action_mask=b.mask
        )
        return module(b.logprobs, experience)

    return loss


def _kl(losses: Any, name: str) -> Any:
    return lambda b: losses.get_approx_kl(name, b.logprobs, b.ref_logprobs, b.mask)
