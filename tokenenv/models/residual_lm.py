"""A small transformer whose logits are added to those of a bigram model: a policy that starts as
its reference."""

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
"""The positions that the config names; RoPE has no table that would end there."""
HEAD_SIZE = 12


class ResidualLM(nn.Module):
    """A trainable policy whose logits are the reference's plus a transformer's (a `TokenModel`).

    A state is the transformer's hidden state (H) with the reference's state as one more number:
    (K, H + 1) float32. The output layer starts at zero, so that the policy starts exactly as its
    reference. The model is on the reference's device, and the same seed gives the same weights.
    It has about 71,000 of them at V = 64 by default.

    Args:
        reference: the bigram model. It is shared, not copied, and never trained.
        hidden_size: H, a multiple of 12.
        num_layers: of the transformer.
        seed: of the initial weights.
    """

    def __init__(
        self, reference: Bigram, *, hidden_size: int = 48, num_layers: int = 2, seed: int = 0
    ) -> None:
        super().__init__()
        self.reference = reference
        # Within the fork, torch's global generator is ours to seed; afterwards it is as before.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.trunk = make_trunk(reference.vocab_size, hidden_size, num_layers)
            self.output = nn.Linear(hidden_size, reference.vocab_size, bias=False)
        nn.init.zeros_(self.output.weight)
        self.to(reference.device).eval()

    @property
    def vocab_size(self) -> int:
        """V, the number of tokens."""
        return self.reference.vocab_size

    @property
    def hidden_size(self) -> int:
        """H, how many numbers of a state a value head may read, the first ones."""
        return self.output.in_features

    @property
    def device(self) -> torch.device:
        """The device where tokens are taken and states returned."""
        return self.output.weight.device

    def slots(self, num_slots: int, max_length: int) -> "ResidualSlots":
        """Make N cached slots for running texts of at most `max_length` tokens."""
        return ResidualSlots(self, num_slots, max_length)

    def states(self, tokens: Tensor, lengths: Sequence[int] | np.ndarray) -> Tensor:
        """Read whole texts with the ambient grad mode: right-padded `tokens` (B, L) to states
        (B, L, H + 1), in which state t has read tokens 0..t."""
        tokens = self.reference.ids(tokens)
        hidden = hidden_states(self.trunk, tokens, lengths)
        return joined(hidden, self.reference.states(tokens, lengths))

    def head(self, states: Tensor) -> Tensor:
        """Return the logits (K, V) float32 after `states` (K, H + 1)."""
        return self.output(states[:, :-1]).float() + self.reference.head(states[:, -1].long())


class ResidualSlots:
    """N slots of the transformer and of the reference, side by side (a `SlotModel`)."""

    def __init__(self, model: ResidualLM, num_slots: int, max_length: int) -> None:
        self.model = model
        self._both: tuple[SlotModel, SlotModel] = (
            CachedLM(model.trunk, num_slots, max_length),
            model.reference.slots(num_slots, max_length),
        )

    def prefill(self, slots: Slots, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Restart `slots` (n,) with right-padded `tokens` (n, <=L), and return the state
        (n, H + 1) after each text."""
        return joined(*(one.prefill(slots, tokens, lengths) for one in self._both))

    def append(self, tokens: Tensor, active: np.ndarray | None = None) -> Tensor:
        """Add one token (N,) to each slot that is `active` (N,) bool (None: to all), and return the
        states (N, H + 1)."""
        return joined(*(one.append(tokens, active) for one in self._both))

    def extend(self, slots: Slots, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Add right-padded `tokens` (n, K), `lengths` (n,) of them, to the texts of `slots` (n,),
        and return the states (n, K, H + 1) after each. Those to the right of a row's last token
        mean nothing."""
        return joined(*(one.extend(slots, tokens, lengths) for one in self._both))

    def fork(self, sources: Slots, targets: Slots) -> None:
        """Copy slot sources[i] onto slot targets[i]."""
        for one in self._both:
            one.fork(sources, targets)

    def states(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Read whole texts; see `ResidualLM.states`."""
        return self.model.states(tokens, lengths)


def joined(hidden: Tensor, reference: Tensor) -> Tensor:
    """Put hidden states (..., H) and reference states (...) together as (..., H + 1) float32."""
    # Also under autocast: half precision would round the reference's state, which is a row number.
    return torch.cat([hidden.float(), reference[..., None].float()], dim=-1)


def make_trunk(vocab_size: int, hidden_size: int, num_layers: int) -> Any:
    """Make a Llama base model with attention heads of 12 numbers."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 10 // 3,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // HEAD_SIZE,
        num_key_value_heads=hidden_size // HEAD_SIZE,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.1,
    )
    return LlamaModel(config)
