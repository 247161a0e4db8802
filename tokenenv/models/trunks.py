"""A trunk maps tokens to states; heads read states. Models that share a trunk are run once."""

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from tokenenv.errors import ModelError
from tokenenv.models import cached_lm
from tokenenv.models.batching import hidden_states
from tokenenv.models.heads import lm_head, token_logprobs
from tokenenv.models.probing import random_ids
from tokenenv.types import Head, SlotModel, Slots

LARGE = 2**30
"""Bytes of caches that are worth a warning, which Python shows even where nobody has set up
logging."""

logger = logging.getLogger("tokenenv")


def trunk_of(model: Any) -> Any:
    """The part of `model` that maps tokens to states: a transformers model's base model, otherwise
    `model` itself."""
    return model if hasattr(model, "slots") else cached_lm.trunk_of(model)


class Trunks:
    """Every distinct trunk among `models`, each as N rows of at most `max_length` tokens.

    States come as a dict from trunk to (rows, H), so that terms that share a model share its
    forward.

    Raises:
        ModelError: a trunk compares by value, so that two models could be taken for one.
    """

    def __init__(
        self, models: Iterable[Any], num_slots: int, max_length: int, **options: Any
    ) -> None:
        trunks = list(dict.fromkeys(_told_apart(trunk_of(model)) for model in models))
        _report_memory(trunks, num_slots, max_length)
        self._rows = {
            trunk: slot_model(trunk, num_slots, max_length, **options) for trunk in trunks
        }

    def prefill(self, slots: Slots, tokens: Tensor, lengths: Sequence[int]) -> dict[Any, Tensor]:
        """Restarts `slots` with right-padded tokens (n, <=L) in every trunk; states (n, H)."""
        return {trunk: rows.prefill(slots, tokens, lengths) for trunk, rows in self._rows.items()}

    def append(self, tokens: Tensor, active: np.ndarray) -> dict[Any, Tensor]:
        """Adds one token (N,) to the rows where `active` (N,) in every trunk; states (N, H)."""
        return {trunk: rows.append(tokens, active) for trunk, rows in self._rows.items()}

    def fork(self, sources: Slots, targets: Slots) -> None:
        """Copies rows in every trunk."""
        for rows in self._rows.values():
            rows.fork(sources, targets)

    def states(self, tokens: Tensor, lengths: Sequence[int]) -> dict[Any, Tensor]:
        """The uncached forward in every trunk: right-padded tokens (B, L) to states (B, L, H)."""
        return {trunk: rows.states(tokens, lengths) for trunk, rows in self._rows.items()}

    def of(self, model: Any) -> SlotModel:
        """The rows of `model`'s trunk."""
        return self._rows[trunk_of(model)]

    @property
    def cache_bytes(self) -> int:
        """The memory that all caches take, in bytes."""
        return sum(getattr(rows, "cache_bytes", 0) for rows in self._rows.values())


def text_states(model: Any, tokens: Tensor, lengths: Sequence[int] | np.ndarray) -> Tensor:
    """The uncached forward of any model's trunk, with the ambient grad mode: right-padded tokens
    (B, L) to states (B, L, ...), in which state t has read token t."""
    trunk = trunk_of(model)
    if hasattr(trunk, "slots"):
        return trunk.states(tokens, lengths)
    # Ids that the model lacks are read as its last, as by `CachedLM`.
    return hidden_states(
        trunk, tokens.clamp(0, trunk.config.get_text_config().vocab_size - 1), lengths
    )


def slot_model(trunk: Any, num_slots: int, max_length: int, **options: Any) -> SlotModel:
    """A model that is no transformers model brings its own rows: `model.slots(num_slots,
    max_length)`."""
    if hasattr(trunk, "slots"):
        return trunk.slots(num_slots, max_length)
    return cached_lm.CachedLM(trunk, num_slots, max_length, **options)


def _told_apart(trunk: Any) -> Any:
    if type(trunk).__hash__ is not object.__hash__:
        name = type(trunk).__name__
        raise ModelError(
            f"{name} defines __eq__ or __hash__, and models are told apart by identity; a "
            f"dataclass takes eq=False."
        )
    return trunk


def _report_memory(trunks: Iterable[Any], num_slots: int, max_length: int) -> None:
    """Logs what the caches will take, before it is taken."""
    sizes = [
        cached_lm.cache_bytes(trunk, num_slots, max_length)
        for trunk in trunks
        if not hasattr(trunk, "slots")
    ]
    level = logging.WARNING if sum(sizes) >= LARGE else logging.INFO
    size = f"{sum(sizes) / 2**20:.1f} MiB on {len(sizes)} model(s)"
    logger.log(level, "caches will take %s: %d texts of %d tokens", size, num_slots, max_length)


def logits_head(model: Any, vocab_size: int) -> Head:
    """States (K, H) to logits (K, V) of a language model; ids it does not have get -inf."""
    if hasattr(model, "slots"):
        return model.head
    return lm_head(model, vocab_size)


def logprob_reader(model: Any, vocab_size: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Maps states (K, H) and tokens (K,) to log p(token | state), (K,) float32, at temperature 1; a
    tabular model's own `logprob` saves making (K, V) logits."""
    if hasattr(model, "logprob"):
        return model.logprob
    return partial(token_logprobs, head=logits_head(model, vocab_size))


def hidden_size_of(model: Any) -> int:
    """How many numbers of a state a value head may read; of a transformers model it is measured:
    some project theirs."""
    if hasattr(model, "slots"):
        return int(model.hidden_size)
    with cached_lm.acting(trunk_of(model)):
        return text_states(model, random_ids(trunk_of(model), 1, 1), [1]).shape[-1]


def vocab_size_of(model: Any) -> int:
    """V: the number of tokens a language model puts a probability on."""
    config = getattr(model, "config", None)
    return int(config.get_text_config().vocab_size if config is not None else model.vocab_size)
