"""A small transformer whose logits are added to a bigram's: a policy that starts as its
reference."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokenenv.types import SlotModel, Slots

from .batching import hidden_states
from .bigram import Bigram
from .cached_lm import CachedLM

MAX_POSITIONS = 256


class ResidualLM(nn.Module):
    """log pi = reference + transformer, normalised (a `TokenModel` with trainable weights).

    A state is the transformer's hidden state (H) and, as one more number, the reference's state:
    (K, H + 1) float32. The output layer starts at zero, so that the policy starts exactly as the
    reference. On the reference's device; the same seed gives the same weights. About 71,000 at V =
    64 by default.

    Args:
        reference: the bigram, taken over as it is: a table is not trained.
        hidden_size: H, a multiple of 12.
        num_layers: of the transformer.
        seed: of the initial weights.
    """

    def __init__(
        self, reference: Bigram, *, hidden_size: int = 48, num_layers: int = 2, seed: int = 0
    ) -> None:
        super().__init__()
        self.reference = reference
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.trunk = make_trunk(reference.vocab_size, hidden_size, num_layers)
            self.output = nn.Linear(hidden_size, reference.vocab_size, bias=False)
        nn.init.zeros_(self.output.weight)
        self.to(reference.device).eval()

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.reference.vocab_size

    @property
    def hidden_size(self) -> int:
        """H: the numbers of a state, the first ones, that a value head may read."""
        return self.output.in_features

    @property
    def device(self) -> torch.device:
        """Where tokens are taken and states returned."""
        return self.output.weight.device

    def slots(self, num_slots: int, max_length: int) -> "ResidualSlots":
        """N running texts of at most `max_length` tokens, cached."""
        return ResidualSlots(self, num_slots, max_length)

    def states(self, tokens: Tensor, lengths: Sequence[int] | np.ndarray) -> Tensor:
        """The uncached forward with the ambient grad mode: right-padded `tokens` (B, L) to states
        (B, L, H + 1)."""
        tokens = self.reference.ids(tokens)
        return joined(
            hidden_states(self.trunk, tokens, lengths), self.reference.states(tokens, lengths)
        )

    def head(self, states: Tensor) -> Tensor:
        """States (K, H + 1) to logits (K, V) float32."""
        return self.output(states[:, :-1]).float() + self.reference.head(states[:, -1].long())


class ResidualSlots:
    """N running texts of the transformer and the reference side by side (a `SlotModel`)."""

    def __init__(self, model: ResidualLM, num_slots: int, max_length: int) -> None:
        self.model = model
        self._rows: tuple[SlotModel, SlotModel] = (
            CachedLM(model.trunk, num_slots, max_length),
            model.reference.slots(num_slots, max_length),
        )

    def prefill(self, slots: Slots, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Restarts `slots` (n,) with right-padded `tokens` (n, <=L); returns the states (n, H + 1)
        after each."""
        return joined(*(rows.prefill(slots, tokens, lengths) for rows in self._rows))

    def append(self, tokens: Tensor, active: np.ndarray | None = None) -> Tensor:
        """Adds one token to each row (N,), or only where `active` (N,) bool; returns states (N, H +
        1)."""
        return joined(*(rows.append(tokens, active) for rows in self._rows))

    def fork(self, sources: Slots, targets: Slots) -> None:
        """Copies row sources[i] onto row targets[i]."""
        for rows in self._rows:
            rows.fork(sources, targets)

    def states(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """As the model's."""
        return self.model.states(tokens, lengths)


def joined(hidden: Tensor, reference: Tensor) -> Tensor:
    """(..., H) and (...) to (..., H + 1), in float32 also under autocast: half precision would
    round the last number."""
    return torch.cat([hidden.float(), reference[..., None].float()], dim=-1)


def make_trunk(vocab_size: int, hidden_size: int, num_layers: int) -> Any:
    """A Llama base model with heads of 12."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 10 // 3,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 12,
        num_key_value_heads=hidden_size // 12,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.1,
    )
    return LlamaModel(config)
