"""One update: epochs of minibatches, a gradient and an optimizer step for each.

Suffixes: B episodes.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from tokenenv.agents.config import AgentConfig
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.learning import losses
from tokenenv.agents.learning.kept import KeptStates
from tokenenv.agents.learning.learner import FrozenLM, LossFunction, Metrics, accumulate_gradient
from tokenenv.agents.learning.policy import LMPolicy
from tokenenv.agents.learning.update_kl import Before
from tokenenv.errors import NotFinite

MakeLoss = Callable[[Tensor], LossFunction]
"""Weights (B,) to the loss of a minibatch, in which a token of episode b counts `weights_B[b]`.
The weight is 0 in episodes that are not in the minibatch."""


def optimise(
    policy: LMPolicy,
    optimizer: torch.optim.Optimizer,
    batch: EpisodeBatch,
    make_loss: MakeLoss,
    config: AgentConfig,
    *,
    rng: np.random.Generator,
    update: int,
    max_new_tokens: int,
    reference: FrozenLM | None = None,
    teacher: FrozenLM | None = None,
) -> Metrics:
    """Take the optimizer steps of one update; return the mean of each metric over its minibatches,
    and how far all of them moved the policy ("policy/update_kl", in nats per token).

    A metric "policy/approx_kl" above `config.target_kl` ends the update before the step of its
    minibatch. Whatever interrupts the update, no gradient is left behind.

    Args:
        rng: draws which episodes share a minibatch.
        update: the number of the update, for errors, and to know which texts are stale.
        max_new_tokens: the longest response, which "fixed-length" divides by.

    Raises:
        NotFinite: a gradient is not finite. The weights are as they were before its minibatch.
    """
    seen: list[Metrics] = []
    before = Before(policy, batch, config, update)
    # In a single epoch nothing is read twice.
    kept = KeptStates(policy) if config.epochs > 1 else None
    # Walking through all modules for them costs as much as clipping does.
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer.zero_grad()
    try:
        for rows in minibatches(len(batch), config, rng):
            lengths = batch.response_length_B[rows]
            weights_B = torch.zeros(len(batch))
            weights_B[rows] = losses.token_weights(lengths, config.aggregation)
            metrics = accumulate_gradient(
                policy,
                batch,
                rows,
                make_loss(weights_B),
                config.max_batch_tokens,
                temperature=config.temperature,
                reference=reference,
                teacher=teacher,
                kept=kept,
                scale=losses.loss_scale(lengths, config.aggregation, max_new_tokens),
            )
            seen.append(metrics)
            # The KL is that of the policy before this step: a step that is not taken cannot
            # lead further away.
            if (
                config.target_kl is not None
                and metrics.get("policy/approx_kl", 0.0) > config.target_kl
            ):
                break
            norm = float(clip_grad_norm_(weights, config.max_grad_norm))
            metrics["policy/grad_norm"] = norm
            if not math.isfinite(norm):
                raise NotFinite(
                    f"the gradient's norm is {norm} in minibatch {len(seen) - 1} of update "
                    f"{update}, with {metrics}; the weights are as they were before that "
                    f"minibatch.",
                    texts=[episode for row, episode in enumerate(batch.unstack()) if row in rows],
                )
            optimizer.step()
            optimizer.zero_grad()
    finally:
        optimizer.zero_grad()
    names = dict.fromkeys(name for metrics in seen for name in metrics)
    means = {name: float(np.mean([m[name] for m in seen if name in m])) for name in names}
    return means | {"policy/minibatches": len(seen), "policy/update_kl": before.kl(policy)}


def minibatches(
    num_episodes: int, config: AgentConfig, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Yield the episodes of each minibatch: in every epoch each episode once, in a new order."""
    for _ in range(config.epochs):
        rows = rng.permutation(num_episodes)
        yield from np.array_split(rows, min(config.minibatches, num_episodes))
