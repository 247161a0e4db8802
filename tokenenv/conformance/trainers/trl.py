"""TRL (`pip install trl`): the losses of `GRPOTrainer._compute_loss`, and the KL term in it. Tried
with 1.16.0. Its advantages are computed in the middle of the method that generates, so they cannot
be called by themselves and are left out."""

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tokenenv.conformance.batches import Batch
from tokenenv.conformance.sources import functions_of
from tokenenv.conformance.subjects import Subject

LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")


def subjects(root: Path) -> list[Subject]:
    """Return TRL's losses by `loss_type`."""
    trainer = functions_of(
        root / "trl/trainer/grpo_trainer.py", nanmin=lambda x: x.min(), nanmax=lambda x: x.max()
    ).GRPOTrainer
    return [
        *(Subject(f"loss, {name}", "loss", _loss(trainer, name)) for name in LOSSES),
        Subject("KL in the loss", "kl", _kl(trainer)),
    ]


def _self(b: Batch, loss_type: str, beta: float) -> SimpleNamespace:
    """What `_compute_loss` reads of its trainer, on one process without accumulation."""
    accelerator = SimpleNamespace(
        num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
    )
    args = SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1)
    settings: dict[str, Any] = {
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "epsilon_low": 0.2,
        "epsilon_high": 5.0 if loss_type == "cispo" else 0.2,
        "use_vllm": False,
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": b.mask.shape[1],
        "_entropy_bonus_enabled": False,
    }
    return SimpleNamespace(
        **settings,
        beta=beta,
        loss_type=loss_type,
        args=args,
        accelerator=accelerator,
        model=SimpleNamespace(training=True),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *_, **__: (b.logprobs, 0 * b.logprobs, None),
    )


def _called(
    trainer: Any, b: Batch, loss_type: str, beta: float, advantages: Tensor, mask: Tensor
) -> Tensor:
    empty = b.groups[:, None][:, :0]
    inputs = {
        "prompt_ids": empty,
        "prompt_mask": empty,
        "completion_ids": b.mask.long(),
        "completion_mask": b.text_mask.long(),
        "tool_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": b.old_logprobs,
        "ref_per_token_logps": b.ref_logprobs,
        "num_items_in_batch": b.mask.sum(),
    }
    loss: Tensor = trainer._compute_loss(_self(b, loss_type, beta), None, inputs)
    return loss


def _loss(trainer: Any, loss_type: str) -> Any:
    return lambda b: _called(trainer, b, loss_type, 0.0, b.advantages, b.mask.double())


def _kl(trainer: Any) -> Any:
    """The KL term of each token: without advantages the loss is their sum, weighed with the
    mask."""

    def terms(b: Batch) -> Tensor:
        mask = b.mask.double().requires_grad_()
        loss = _called(trainer, b, "dr_grpo", 1.0, 0 * b.advantages, mask)
        return torch.autograd.grad(loss, mask, create_graph=True)[0] * mask.numel()

    return terms
