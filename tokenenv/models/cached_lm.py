"""CachedLM: N texts running through one causal model, each row at its own position."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from tokenenv.errors import InvalidArgument, ModelError

from .adapters import unwrapped
from .batching import hidden_states, in_micro_batches, upload
from .rope import fix_rope

if TYPE_CHECKING:
    from .recompute import TextSlots
    from .slot_cache import KVSlots


class CachedLM:
    """A causal transformer with N rows of keys and values (a `SlotModel`): one token's forward per
    step.

    A row's states never depend on what other rows hold. Whether the model can be cached per row is
    tried out when the object is built, at `max_length` tokens, which costs the forwards of two such
    texts; a model that cannot is run by recomputing the text at every append, with one warning.
    Everything but `states` runs without gradients and in eval mode. The device is never waited for.

    Args:
        trunk: a transformers base model, or a model with a head (its base model is taken).
        num_slots: N.
        max_length: tokens a row can hold, L. Fixes `dynamic` and `longrope` RoPE (see `fix_rope`).
        max_batch_tokens: tokens, padding included, of one forward of `prefill`.
        compile: compile the forward of `append` (CUDA graphs on CUDA): slow at first, one graph per
            length bucket.

    Raises:
        InvalidArgument: a size is not positive.
        ModelError: the model has fewer positions than `max_length`.
    """

    def __init__(
        self,
        trunk: Any,
        num_slots: int,
        max_length: int,
        *,
        max_batch_tokens: int = 16384,
        compile: bool = False,
    ):
        for name, value in (
            ("num_slots", num_slots),
            ("max_length", max_length),
            ("max_batch_tokens", max_batch_tokens),
        ):
            if value < 1:
                raise InvalidArgument(f"{name}={value} must be at least 1")
        self.trunk = trunk_of(trunk)
        self.num_slots = num_slots
        self.max_length = max_length
        self.max_batch_tokens = max_batch_tokens
        self.positions = np.zeros(num_slots, dtype=np.int64)
        """(N,) tokens each row holds; 0: never prefilled. Read only."""
        _check_positions(self.trunk, max_length)
        fix_rope(text_part(self.trunk), max_length)
        self._last_id = self.trunk.config.get_text_config().vocab_size - 1
        self._rows = self._make_rows(compile)
        with acting(self.trunk):  # allocates everything now rather than in the middle of a run
            self._rows.prefill(self._upload([0]), self._upload([[0]]))

    @property
    def device(self) -> torch.device:
        """Where tokens are taken and states returned."""
        return self.trunk.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the states."""
        return self.trunk.dtype

    @property
    def cache_bytes(self) -> int:
        """Memory the rows take (see `cache_bytes` for the figure before they take it)."""
        return self._rows.nbytes

    def prefill(
        self, slots: Sequence[int] | np.ndarray, tokens: Tensor, lengths: Sequence[int] | np.ndarray
    ) -> Tensor:
        """Restarts rows `slots` (n,) with right-padded `tokens` (n, <=L); returns the states after
        each row's last token (n, H). Runs in length-sorted micro-batches. `slots` and `lengths`
        (n,) are host data."""
        slots, lengths = np.asarray(slots, dtype=np.int64), np.asarray(lengths, dtype=np.int64)
        self._check_rows("slots", slots, unique=True)
        if lengths.shape != slots.shape or len(tokens) != len(slots):
            raise InvalidArgument(
                f"prefill: {len(slots)} slots, {len(tokens)} texts and {lengths.shape} lengths"
            )
        limit = min(tokens.shape[1], self.max_length)
        if len(slots) == 0 or lengths.min() < 1 or lengths.max() > limit:
            raise InvalidArgument(
                f"prefill: lengths={lengths.tolist()}; allowed: one or more, each 1..{limit}"
            )
        tokens = self._ids(tokens)

        def forward(group: np.ndarray, width: int) -> Tensor:
            return self._rows.prefill(
                self._upload(slots[group]), tokens[self._upload(group), :width]
            )

        with acting(self.trunk):
            states = in_micro_batches(forward, lengths, self.max_batch_tokens)
        self.positions[slots] = lengths
        return states

    def append(self, tokens: Tensor, active: np.ndarray | Sequence[bool] | None = None) -> Tensor:
        """Adds one token to each row (N,), or only to rows where `active` (N,) bool host data;
        returns states (N, H).

        Rows that are not active keep their text, rows never prefilled stay empty; their states mean
        nothing.

        Raises:
            InvalidArgument: a shape is wrong or an active row is full; nothing has changed.
        """
        active = (
            np.ones(self.num_slots, dtype=bool)
            if active is None
            else np.asarray(active, dtype=bool)
        )
        for name, shape in (("tokens", tuple(tokens.shape)), ("active", active.shape)):
            if shape != (self.num_slots,):
                raise InvalidArgument(
                    f"append: {name} of shape {shape}; allowed: ({self.num_slots},)"
                )
        moving = active & (self.positions > 0)
        if full := np.flatnonzero(moving & (self.positions >= self.max_length)).tolist():
            raise InvalidArgument(
                f"append: rows {full} already hold max_length={self.max_length} tokens"
            )
        with acting(self.trunk):
            states = self._rows.append(self._ids(tokens), self.positions, moving)
        self.positions += moving
        return states

    def fork(
        self, sources: Sequence[int] | np.ndarray, targets: Sequence[int] | np.ndarray
    ) -> None:
        """Copies row sources[i] onto row targets[i]; all sources are read before any target is
        written."""
        sources, targets = np.asarray(sources, dtype=np.int64), np.asarray(targets, dtype=np.int64)
        self._check_rows("sources", sources)
        self._check_rows("targets", targets, unique=True)
        if len(sources) != len(targets):
            raise InvalidArgument(
                f"fork: {len(sources)} sources and {len(targets)} targets; allowed: as many of each"
            )
        width = int(self.positions[sources].max(initial=0))
        if width:
            self._rows.fork(self._upload(sources), self._upload(targets), width)
        self.positions[targets] = self.positions[sources]

    def states(self, tokens: Tensor, lengths: Sequence[int] | np.ndarray) -> Tensor:
        """The uncached forward, with the ambient grad mode: right-padded `tokens` (B, L) to states
        (B, L, H), in which state t has read token t. Not split: pass one micro-batch."""
        return hidden_states(self.trunk, self._ids(tokens), lengths)

    def _make_rows(self, compile: bool) -> "KVSlots | TextSlots":
        from .probing import why_uncached
        from .recompute import TextSlots
        from .slot_cache import KVSlots

        # A copy of the model keeps what was found out: the policy's caches need no trial after the
        # env's.
        tried = vars(self.trunk).setdefault("tried_caches", {})
        key = (self.max_length, self.trunk.dtype, self.trunk.config._attn_implementation)
        if key not in tried:
            tried[key] = why_uncached(self.trunk, self.max_length)
        reason = tried[key]
        if reason is None:
            return KVSlots(self.trunk, self.num_slots, self.max_length, compile)
        warnings.warn(
            f"{type(self.trunk).__name__} cannot be cached per row ({reason}): every append reads "
            f"each row's whole "
            f"text again, so a text of n tokens costs n*n/2 token forwards instead of n",
            RuntimeWarning,
            stacklevel=3,
        )
        return TextSlots(self.trunk, self.num_slots, self.max_length, self.max_batch_tokens)

    def _upload(self, array: Any) -> Tensor:
        return upload(np.asarray(array, dtype=np.int64), self.device)

    def _ids(self, tokens: Tensor) -> Tensor:
        """On the model's device; ids the model lacks are read as its last: out of range would end a
        CUDA process."""
        return tokens.to(self.device, non_blocking=True).clamp(0, self._last_id)

    def _check_rows(self, name: str, rows: np.ndarray, unique: bool = False) -> None:
        wrong = rows.ndim != 1 or bool(((rows < 0) | (rows >= self.num_slots)).any())
        if wrong or (unique and len(np.unique(rows)) < len(rows)):
            how = "each once" if unique else "in any number"
            raise InvalidArgument(
                f"{name}={rows.tolist()}; allowed: rows 0..{self.num_slots - 1}, {how}"
            )


def trunk_of(model: Any) -> Any:
    """The transformers base model inside a model with a head or a peft model; a base model is
    returned as it is."""
    return unwrapped(model).base_model  # a peft model's own `base_model` is something else


def text_part(trunk: Any) -> Any:
    """The module that reads the text: the trunk itself, but of a model that also sees or hears, its
    language model."""
    return trunk.get_decoder() if hasattr(trunk, "get_decoder") else trunk


@contextmanager
def acting(trunk: Any) -> Iterator[None]:
    """No gradients and eval mode (dropout and gradient checkpointing would break a cache), restored
    afterwards."""
    with evaluating(trunk), torch.no_grad():
        yield


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode, restored afterwards. Of models that are in it already nothing but that is
    asked."""
    training = [
        module
        for model in models
        if model.training
        for module in model.modules()
        if module.training
    ]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def cache_bytes(trunk: Any, num_slots: int, max_length: int) -> int:
    """Memory that `CachedLM(trunk, num_slots, max_length)` will take for its rows, measured on a
    single token."""
    from .slot_cache import KVSlots

    trunk = trunk_of(trunk)
    try:
        rows = KVSlots(trunk, 1, 1)
        token = torch.zeros(1, 1, dtype=torch.int64, device=trunk.device)
        with acting(trunk):
            rows.prefill(token[0], token)
    except Exception:
        return num_slots * max_length * 8
    return num_slots * max_length * (rows.nbytes or 8)


def _check_positions(trunk: Any, max_length: int) -> None:
    """Learned positions end; reading beyond them would end a CUDA process."""
    named = getattr(trunk.config.get_text_config(), "max_position_embeddings", None)
    for name, module in text_part(trunk).named_modules():
        if isinstance(module, nn.Embedding) and ("wpe" in name or "pos" in name):
            positions = min(
                module.num_embeddings, named or module.num_embeddings
            )  # some tables begin with unused rows
            if positions < max_length:
                raise ModelError(
                    f"max_length={max_length}: {type(trunk).__name__} has {positions} positions; "
                    f"allowed: at most that many"
                )
