"""Models in two parts: a trunk maps tokens to states, and a head reads states. Models that share a
trunk are run once."""

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenenv.errors import ModelError
from tokenenv.models import cached_lm
from tokenenv.models.batching import hidden_states, upload
from tokenenv.models.heads import lm_head, token_logprobs
from tokenenv.models.probing import random_ids
from tokenenv.models.same_texts import prefill_once
from tokenenv.models.stacked import ReadAlong, can_stack, share_base, stacks_of
from tokenenv.types import Head, SlotModel, Slots

LARGE = 2**30
"""Bytes of caches from which on they are logged as a warning, which Python shows even where nobody
has set up logging."""

logger = logging.getLogger("tokenenv")


def trunk_of(model: Any) -> Any:
    """Return the part of `model` that maps tokens to states: the base model of a transformers
    model, and any `TokenModel` itself."""
    return model if hasattr(model, "slots") else cached_lm.trunk_of(model)


class Trunks:
    """Every distinct trunk among some models, with N slots of at most `max_length` tokens each.

    States come as a dict from trunk to tensor, so that terms that share a model share its forward.

    Args:
        models: transformers models or `TokenModel`s; several may share a trunk.
        num_slots: N.
        max_length: L, the most tokens of a text.
        **options: of `CachedLM`.

    Raises:
        ModelError: a trunk compares by value, so that two models could be taken for one.
    """

    def __init__(
        self, models: Iterable[Any], num_slots: int, max_length: int, **options: Any
    ) -> None:
        trunks = list(dict.fromkeys(_told_apart(trunk_of(model)) for model in models))
        _report_memory(trunks, num_slots, max_length)
        self._num_slots = num_slots
        self._slots = {
            trunk: slot_model(trunk, num_slots, max_length, **options) for trunk in trunks
        }
        self._stacks = stacks_of(list(self._slots.values()))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the stacks, whose parts of one memory a pickle would part. A copy makes its
        own, without a policy."""
        return {name: value for name, value in vars(self).items() if name != "_stacks"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._stacks = stacks_of(list(self._slots.values()))

    def share_base(self, model: Any) -> bool:
        """Return whether a policy's `model` has the base of a trunk here in common with it, and may
        be read along."""
        slots: list[Any] = list(self._slots.values())
        return any(can_stack(one) and share_base(one.trunk, trunk_of(model)) for one in slots)

    def read_along(self, texts: SlotModel | None) -> SlotModel | None:
        """Have a policy's running texts read each token in the forward of the trunks that have the
        same base; those that were read along before no longer are.

        Args:
            texts: with N slots of `max_length` tokens; None: nobody's from now on.

        Returns:
            What the policy reads its texts by from now on. Where nothing can be shared, it is
            `texts`.
        """
        models: list[Any] = list(self._slots.values())
        along = None
        if can_stack(texts) and self.share_base(texts.trunk):
            sizes = {(model.num_slots, model.max_length) for model in models if can_stack(model)}
            along = ReadAlong(texts) if sizes == {(texts.num_slots, texts.max_length)} else None
        if along is None and texts is not None:
            return texts
        for stack in self._stacks:
            stack.part()
        self._stacks = stacks_of(models, along)
        return along

    def prefill(
        self, slots: Slots, tokens: Tensor, lengths: Sequence[int], first: np.ndarray
    ) -> dict[Any, Tensor]:
        """Restart `slots` (n,) with right-padded `tokens` (n, <=L) in every trunk; of equal texts
        only the `first` (n,) is read (see `same_texts`). Return the state (n, H) after each text,
        by trunk."""
        return {
            trunk: prefill_once(model, slots, tokens, lengths, first)
            for trunk, model in self._slots.items()
        }

    def append(self, tokens: Tensor, active: np.ndarray) -> dict[Any, Tensor]:
        """Add one token (N,) to the slots that are `active` (N,) bool, in every trunk. Return the
        state (N, H) after it, by trunk."""
        found: dict[Any, Tensor] = {}
        for stack in self._stacks:
            found |= stack.append(tokens, active)
        return {
            trunk: found[trunk] if trunk in found else model.append(tokens, active)
            for trunk, model in self._slots.items()
        }

    def extend(
        self, slots: Slots, tokens: Tensor, lengths: Sequence[int] | np.ndarray
    ) -> dict[Any, Tensor]:
        """Add right-padded `tokens` (n, K), `lengths` (n,) of them, to the texts of `slots` (n,) in
        every trunk. Return the states (n, K, H) after each token, by trunk; those to the right of a
        row's last token mean nothing."""
        return {
            trunk: extend_slots(model, self._num_slots, slots, tokens, lengths)
            for trunk, model in self._slots.items()
        }

    def fork(self, sources: Slots, targets: Slots) -> None:
        """Copy slot sources[i] onto slot targets[i] in every trunk."""
        for _, model in self._slots.items():
            model.fork(sources, targets)

    def states(self, tokens: Tensor, lengths: Sequence[int]) -> dict[Any, Tensor]:
        """Run whole texts without a cache in every trunk: right-padded `tokens` (B, L) to states
        (B, L, H), by trunk."""
        return {trunk: model.states(tokens, lengths) for trunk, model in self._slots.items()}

    def of(self, model: Any) -> SlotModel:
        """Return the slots of `model`'s trunk."""
        return self._slots[trunk_of(model)]

    @property
    def cache_bytes(self) -> int:
        """The memory that all caches take, in bytes."""
        return sum(getattr(model, "cache_bytes", 0) for _, model in self._slots.items())


def text_states(model: Any, tokens: Tensor, lengths: Sequence[int] | np.ndarray) -> Tensor:
    """Run whole texts through any model's trunk, without a cache and with the ambient grad mode.

    Args:
        model: a transformers model or a `TokenModel`.
        tokens: (B, L) right-padded.
        lengths: (B,) host data.

    Returns:
        (B, L, ...), in which state t has read tokens 0..t.
    """
    trunk = trunk_of(model)
    if hasattr(trunk, "slots"):
        return trunk.states(tokens, lengths)
    # Ids that the model lacks are read as its last one, as in `CachedLM`.
    last_id = trunk.config.get_text_config().vocab_size - 1
    return hidden_states(trunk, tokens.clamp(0, last_id), lengths)


def slot_model(trunk: Any, num_slots: int, max_length: int, **options: Any) -> SlotModel:
    """Make N slots of a trunk: a `CachedLM` of a transformers model, and what `model.slots` makes
    of a `TokenModel`, which takes none of the `options`."""
    if hasattr(trunk, "slots"):
        return trunk.slots(num_slots, max_length)
    return cached_lm.CachedLM(trunk, num_slots, max_length, **options)


def extend_slots(
    model: SlotModel,
    num_slots: int,
    slots: Slots,
    tokens: Tensor,
    lengths: Sequence[int] | np.ndarray,
) -> Tensor:
    """Add several tokens to some running texts, as `SlotModel.extend` does. A model of the user's
    that has no such method is given them one by one.

    Args:
        model: the running texts.
        num_slots: N, of the model.
        slots: (n,) host data, each slot at most once.
        tokens: (n, K) right-padded.
        lengths: (n,) host data, 1..K.

    Returns:
        (n, K, H) the states after each token; those to the right of a row's last one mean nothing.
    """
    slots, lengths = np.asarray(slots), np.asarray(lengths)
    if hasattr(model, "extend"):
        return model.extend(slots, tokens, lengths.tolist())
    rows, states = upload(slots, tokens.device), []
    for t, column in enumerate(tokens.unbind(1)):
        active = np.zeros(num_slots, dtype=bool)
        active[slots[lengths > t]] = True
        everywhere = column.new_zeros(num_slots).index_copy(0, rows, column)
        after = model.append(everywhere, active)
        states.append(after[upload(slots, after.device)])
    return torch.stack(states, 1)


def _told_apart(trunk: Any) -> Any:
    # Trunks are keys of dicts. Models with an __eq__ of their own, such as a plain dataclass, would
    # be equal where they are not the same.
    if type(trunk).__hash__ is not object.__hash__:
        raise ModelError(
            f"{type(trunk).__name__} defines __eq__ or __hash__, and models are told apart by "
            "identity; a dataclass takes eq=False."
        )
    return trunk


def _report_memory(trunks: Iterable[Any], num_slots: int, max_length: int) -> None:
    """Log what the caches will take, before it is taken."""
    sizes = [
        cached_lm.cache_bytes(trunk, num_slots, max_length)
        for trunk in trunks
        if not hasattr(trunk, "slots")
    ]
    level = logging.WARNING if sum(sizes) >= LARGE else logging.INFO
    size = f"{sum(sizes) / 2**20:.1f} MiB on {len(sizes)} model(s)"
    logger.log(level, "caches will take %s: %d texts of %d tokens", size, num_slots, max_length)


def logits_head(model: Any, vocab_size: int) -> Head:
    """Return the map from states (K, H) to logits (K, V) of a language model. Ids that the model
    does not have get -inf."""
    if hasattr(model, "slots"):
        return model.head
    return lm_head(model, vocab_size)


def logprob_reader(model: Any, vocab_size: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the map from states (K, H) and tokens (K,) to log p(token | state), (K,) float32, in
    nats at temperature 1."""
    # A table has the log-prob of one token ready: its own method spares the (K, V) logits.
    if hasattr(model, "logprob"):
        return model.logprob
    return partial(token_logprobs, head=logits_head(model, vocab_size))


def log_ratio(logprob: Tensor, ref_logprob: Tensor) -> Tensor:
    """Return log p - log p_ref; 0 for a token that neither model has, where both are -inf."""
    # Not where the two are equal: they are where training begins, and must have a gradient there.
    neither = logprob.isneginf() & ref_logprob.isneginf()
    return torch.where(neither, 0.0, logprob - ref_logprob)


def hidden_size_of(model: Any) -> int:
    """Return how many numbers of a state a value head may read, the first ones."""
    if hasattr(model, "slots"):
        return int(model.hidden_size)
    # Measured, because some models project their states to a size that their config does not name.
    with cached_lm.acting(trunk_of(model)):
        return text_states(model, random_ids(trunk_of(model), 1, 1), [1]).shape[-1]


def vocab_size_of(model: Any) -> int:
    """Return V, the number of tokens that a language model gives a probability."""
    config = getattr(model, "config", None)
    return int(config.get_text_config().vocab_size if config is not None else model.vocab_size)
