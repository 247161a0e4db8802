"""From the states of a model at the places of texts to the rewards of their tokens.

Suffixes: B texts, R response tokens, S = R + 1 places (the end of the prompt, and each response
token), K places of several texts, one text after another.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokenenv.fit.examples import Text
from tokenenv.models.batching import upload
from tokenenv.models.trunks import text_states, trunk_of


class Reading(NamedTuple):
    """The rewards of B texts, as a `Batch` holds them: differentiable, on the model's device."""

    reward_BR: Tensor
    """float32; 0 where `mask_BR` is False."""
    running_BR: Tensor
    """float32: the value of the text after each token, with what others write behind it."""
    start_B: Tensor
    """float32: the value of the text before the first own token, which is mostly the prompt."""
    mask_BR: Tensor
    """bool: the policy's own tokens."""


def summed(number_BS: Tensor, mask_BR: Tensor) -> Reading:
    """Return the rewards of numbers that are rewards: of own tokens what stands there, of others
    0."""
    reward_BR = torch.where(mask_BR, number_BS[:, 1:], 0.0)
    return Reading(reward_BR, reward_BR.cumsum(1), number_BS.new_zeros(len(number_BS)), mask_BR)


def differences(number_BS: Tensor, mask_BR: Tensor, length_B: Tensor) -> Reading:
    """Return the rewards of numbers that are values: of an own token the value of the state that
    the policy acts in next, or of the finished text, less that of the state it was chosen in.

    So what others write behind a token belongs to its difference, as `reward="delta"` pays it, and
    a loss on `running_BR` and `start_B` trains the values that an environment reads.

    Args:
        number_BS: the value at each place.
        mask_BR: the policy's own tokens.
        length_B: int64, the response tokens of each text, whoever wrote them.
    """
    place_R = torch.arange(mask_BR.shape[1], device=number_BS.device)
    acts_BR = torch.where(mask_BR, place_R, length_B[:, None])
    acts_BS = torch.cat([acts_BR, length_B[:, None]], 1)
    # The first place from each one on at which the policy acts, or the text ends.
    acts_BS = acts_BS.flip(1).cummin(1).values.flip(1)
    value_BS = number_BS.gather(1, acts_BS)
    reward_BR = torch.where(mask_BR, value_BS[:, 1:] - value_BS[:, :-1], 0.0)
    return Reading(reward_BR, value_BS[:, 1:], value_BS[:, 0], mask_BR)


def place_states(model: Any, texts: Sequence[Text]) -> Tensor:
    """Run texts through a model's trunk in one forward. Return the states (K, ...) at the places of
    the texts, one text after another."""
    lengths = np.asarray([len(text) for text in texts])
    tokens = np.zeros((len(texts), int(lengths.max())), dtype=np.int64)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text.ids
    device = trunk_of(model).device
    states = text_states(model, upload(tokens, device), lengths)
    starts = np.asarray([len(text.prompt) - 1 for text in texts])
    position = np.arange(tokens.shape[1])
    wanted = (position >= starts[:, None]) & (position < lengths[:, None])
    at = (upload(index, device) for index in np.nonzero(wanted))
    return states[tuple(at)]


def place_logprobs(
    model: Any, logprob: Callable[[Tensor, Tensor], Tensor], texts: Sequence[Text]
) -> Tensor:
    """Return log p of the own token at each place, (K,) float32 in nats, one text after another; 0
    at the places of others."""
    states = place_states(model, texts)
    ids = np.concatenate([[0, *text.response] for text in texts])
    own = np.flatnonzero(np.concatenate([[False, *text.own_mask] for text in texts]))
    at, before, tokens = (upload(one, states.device) for one in (own, own - 1, ids[own]))
    zeros = torch.zeros(len(ids), device=states.device)
    return zeros.index_put((at,), logprob(states[before], tokens))
