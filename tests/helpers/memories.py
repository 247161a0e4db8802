"""Terms that carry more than one number along a text."""

from typing import Any

import torch

from tokenenv.models.trunks import hidden_size_of
from tokenenv.rewards import RewardTerm


class LastTokens(RewardTerm):
    """Carries the last three tokens of the text, the prompt's last one included, (K, 3) int64; its
    reward is a number that tells every such triple from every other."""

    name = "last"
    has_memory = True
    memory_shape = (3,)
    memory_dtype = torch.int64

    def remember(self, memory: Any, tokens: Any, states: Any) -> torch.Tensor:
        if memory is None:
            memory = tokens.new_zeros(len(tokens), 3)
        return torch.cat([memory[:, 1:], tokens[:, None]], 1)

    def reward(self, batch: Any) -> torch.Tensor:
        # Made on the device: a step may not wait for numbers from the host.
        place = 10.0 ** -torch.arange(2, 5, device=batch.tokens.device)
        before, after = (s.memory[self.name] for s in (batch.before, batch.after))
        return (after * place).sum(1) - (before * place).sum(1)


class Drift(RewardTerm):
    """Carries the running mean of the reference's states, (K, H) float32; its reward is how far the
    mean moves."""

    name = "drift"
    has_memory = True

    def bind(self, context: Any) -> None:
        super().bind(context)
        self.models = (context.reference,)
        self.memory_shape = (hidden_size_of(context.reference),)

    def remember(self, memory: Any, tokens: Any, states: Any) -> torch.Tensor:
        state = states.of(self.models[0])
        return state if memory is None else memory + (state - memory) / (states.step[:, None] + 1)

    def reward(self, batch: Any) -> torch.Tensor:
        return (batch.after.memory[self.name] - batch.before.memory[self.name]).norm(dim=1)
