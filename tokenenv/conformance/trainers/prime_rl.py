"""prime-rl (github.com/PrimeIntellect-ai/prime-rl; not on PyPI): the credit of its GRPO and its
losses. Tried with commit 559b447 (21 August 2026)."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tokenenv.conformance.batches import Batch
from tokenenv.conformance.sources import functions_of
from tokenenv.conformance.subjects import KL_WORLDS, Subject

FOLDER = "src/prime_rl/orchestrator/algo"
LOSSES: dict[str, tuple[str, dict[str, float]]] = {
    "dppo loss": ("default_loss_fn", {"dppo_mask_low": 0.2, "dppo_mask_high": 0.2}),
    "ipo loss": ("ipo_loss_fn", {"ipo_threshold": 0.2}),
}


def subjects(root: Path) -> list[Subject]:
    """Return prime-rl's functions. Its pull to the sampling policy (`kl_tau`) is left out of the
    losses, as it is a term of its own."""
    assign = functions_of(root / FOLDER / "routing.py").assign_advantages
    traces = functions_of(root / FOLDER / "base.py").iter_trainable_traces
    grpo = functions_of(
        root / FOLDER / "grpo.py", assign_advantages=assign, iter_trainable_traces=traces
    ).GRPOAlgorithm
    losses = functions_of(root / "src/prime_rl/trainer/rl/loss.py", LossOutputs=SimpleNamespace)
    return [
        Subject("grpo", "groups", lambda b: _credit(grpo, b), without=KL_WORLDS),
        *(Subject(name, "loss", _loss(losses, *how)) for name, how in LOSSES.items()),
    ]


def _trace(mask: Tensor, reward: float) -> SimpleNamespace:
    node = SimpleNamespace(mask=mask.tolist(), token_ids=[0] * len(mask), advantages=None)
    agent = SimpleNamespace(trainable=True)
    return SimpleNamespace(id="", nodes=[node], reward=reward, has_error=False, agent=agent)


def _credit(grpo: Any, b: Batch) -> Tensor:
    algorithm = object.__new__(grpo)
    algorithm.length_penalty = None
    traces = [_trace(*one) for one in zip(b.mask, b.scores.tolist(), strict=True)]
    size = b.group_size

    async def score() -> None:
        for start in range(0, len(traces), size):
            await algorithm.score_group([SimpleNamespace(traces=traces[start : start + size])])

    asyncio.run(score())
    out = torch.zeros(b.mask.shape)
    out[b.mask] = torch.tensor([one for trace in traces for one in trace.nodes[0].advantages])
    return out


def _loss(losses: Any, function: str, settings: dict[str, float]) -> Any:
    config = SimpleNamespace(adv_tau=1.0, kl_tau=0.0, **settings)

    def loss(b: Batch) -> Tensor:
        inputs = SimpleNamespace(
            trainer_logprobs=b.logprobs,
            inference_logprobs=b.old_logprobs,
            advantages=b.advantages,
            loss_mask=b.mask,
            loss_weights=None,
        )
        return getattr(losses, function)(inputs, config).loss / b.mask.sum()

    return loss
