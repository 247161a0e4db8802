"""What a policy says about the response tokens of one text after another, from the model's own
forward without padding, and the gradients of such numbers."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tokenenv.agents.episodes import EpisodeBatch


def text_logprobs(policy: Any, batch: EpisodeBatch, temperature: float = 1.0) -> Iterator[Tensor]:
    """Yield log pi of all tokens (T, V) at each response place, text after text; with gradient."""
    for row in range(len(batch)):
        length, responses = int(batch.length_B[row]), int(batch.response_length_B[row])
        logits = policy.model(input_ids=batch.tokens_BL[row : row + 1, :length]).logits[0]
        yield (logits[length - responses - 1 : length - 1].float() / temperature).log_softmax(-1)


def emitted(batch: EpisodeBatch, row: int) -> Tensor:
    """Return the response tokens (T,) of a text."""
    length, responses = int(batch.length_B[row]), int(batch.response_length_B[row])
    return batch.tokens_BL[row, length - responses : length]


def token_logprobs_by_text(policy: Any, batch: EpisodeBatch) -> list[Tensor]:
    """Return log pi (T,) of the emitted tokens of each text; with gradient."""
    return [
        logprobs_TV.gather(1, emitted(batch, row)[:, None])[:, 0]
        for row, logprobs_TV in enumerate(text_logprobs(policy, batch))
    ]


def gradient(loss: Tensor, policy: Any) -> list[Tensor]:
    """Return d loss / d weight of the policy's language model."""
    weights = [weight for weight in policy.model.parameters() if weight.requires_grad]
    return list(torch.autograd.grad(loss, weights, retain_graph=True))


def first_step(agent: Any, batch: EpisodeBatch) -> tuple[list[Tensor], dict[str, float]]:
    """Return the gradient that an update's first step would take, and the update's metrics; no
    weight moves."""
    grads: list[list[Tensor]] = []

    def step() -> None:
        weights = [weight for weight in agent.policy.model.parameters() if weight.requires_grad]
        grads.append([weight.grad.clone() for weight in weights])

    own, agent.optimizer.step = agent.optimizer.step, step
    try:
        metrics = agent.update(batch)
    finally:
        agent.optimizer.step = own
    return grads[0], metrics


def assert_same(found: list[Tensor], wanted: list[Tensor], **tolerance: float) -> None:
    """Assert that two gradients agree, and that there is one."""
    assert max(float(one.abs().max()) for one in wanted) > 1e-4
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, **({"rtol": 1e-4, "atol": 1e-6} | tolerance))
