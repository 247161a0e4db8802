"""CachedLM: N texts that run through one causal transformer, each at its own position.

A *slot* is one of the N places of the cache, as it is one of the N places of an env: it holds one
text after another. A *row* is a line of any other batch of texts.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from tokenenv.errors import InvalidArgument, ModelError

from .adapters import unwrapped
from .batching import hidden_states, in_micro_batches, in_order, micro_batches, upload
from .rope import fix_rope

if TYPE_CHECKING:
    from .recompute import TextSlots
    from .slot_cache import KVSlots


class CachedLM:
    """A causal transformer with keys and values for N texts (a `SlotModel`): a step costs the
    forward of one new token in each slot.

    The states of one slot never depend on what the other slots hold. Whether this model can be
    cached per slot is tried out when the object is built, at `max_length` tokens, which costs the
    forwards of two such texts. A model that cannot be cached is run by recomputing the whole text
    at every append, and one warning says so. All methods but `states` run without gradients and in
    eval mode. No method makes the host wait for the device.

    Args:
        trunk: a transformers base model, or a model with a head (its base model is taken).
        num_slots: N.
        max_length: L, the most tokens a slot can hold. It also fixes `dynamic` and `longrope` RoPE
            (see `fix_rope`).
        max_batch_tokens: the most tokens, padding included, of one forward of `prefill` and
            `extend`.
        compile: compiles the forward of `append`, into CUDA graphs on CUDA. The first steps are
            slow then: there is one graph for each length bucket.

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
        sizes = {
            "num_slots": num_slots,
            "max_length": max_length,
            "max_batch_tokens": max_batch_tokens,
        }
        for name, size in sizes.items():
            if size < 1:
                raise InvalidArgument(f"{name}={size} must be at least 1")
        self.trunk = trunk_of(trunk)
        self.num_slots = num_slots
        self.max_length = max_length
        self.max_batch_tokens = max_batch_tokens
        self.positions = np.zeros(num_slots, dtype=np.int64)
        """(N,) how many tokens each slot holds; 0: never prefilled. Read only."""
        # The RoPE is fixed before the cache is tried out: the trial compares cached with uncached
        # states, and both must use the frequencies that all later forwards use.
        _check_positions(self.trunk, max_length)
        fix_rope(text_part(self.trunk), max_length)
        self._last_id = self.trunk.config.get_text_config().vocab_size - 1
        self._slots = self._make_slots(compile)
        # The cache allocates its memory at the first prefill. Doing that here means that too little
        # memory is an error now, not in the middle of a run.
        with acting(self.trunk):
            self._slots.prefill(self._upload([0]), self._upload([[0]]))

    @property
    def device(self) -> torch.device:
        """The device where tokens are taken and states returned."""
        return self.trunk.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the states."""
        return self.trunk.dtype

    @property
    def cache_bytes(self) -> int:
        """The memory that the slots take, in bytes. The function `cache_bytes` gives the same
        figure before it is taken."""
        return self._slots.nbytes

    def prefill(
        self, slots: Sequence[int] | np.ndarray, tokens: Tensor, lengths: Sequence[int] | np.ndarray
    ) -> Tensor:
        """Restart some slots with new texts, and return the state after each text's last token.

        The forwards run in length-sorted micro-batches.

        Args:
            slots: (n,) host data, each slot at most once.
            tokens: (n, <=L) right-padded texts, on any device.
            lengths: (n,) host data, the number of tokens of each text, 1 or more.

        Returns:
            (n, H) the states, in the order of `slots`.

        Raises:
            InvalidArgument: a slot, a shape or a length is wrong; nothing has changed.
        """
        slots, lengths = self._checked("prefill", slots, tokens, lengths)
        tokens = self.known_ids(tokens)

        def forward(group: np.ndarray, width: int) -> Tensor:
            rows = tokens[self._upload(group), :width]
            return self._slots.prefill(self._upload(slots[group]), rows)

        with acting(self.trunk):
            states = in_micro_batches(forward, lengths, self.max_batch_tokens)
        # Positions move only after the forwards: an error in between leaves them as they were.
        self.positions[slots] = lengths
        return states

    def append(self, tokens: Tensor, active: np.ndarray | Sequence[bool] | None = None) -> Tensor:
        """Add one token to each active slot, and return the states after it.

        A slot that is not active keeps its text, and a slot that was never prefilled stays empty.
        The states of both mean nothing.

        Args:
            tokens: (N,) int64, on any device.
            active: (N,) bool host data; None: all slots.

        Returns:
            (N, H) the states.

        Raises:
            InvalidArgument: a shape is wrong or an active slot is full; nothing has changed.
        """
        moving = self.moving(tokens, active)
        # All N slots go through the forward, moving or not: its shape stays the same at every step,
        # which compiling and CUDA graphs need. Only moving slots advance their position, so the
        # next token of the others overwrites what was written for them here.
        with acting(self.trunk):
            states = self._slots.append(self.known_ids(tokens), self.positions, moving)
        self.positions += moving
        return states

    def moving(self, tokens: Tensor, active: np.ndarray | Sequence[bool] | None) -> np.ndarray:
        """Return the slots (N,) bool whose text grows where these tokens (N,) are appended to the
        `active` ones; raise `InvalidArgument` as `append` does."""
        if active is None:
            active = np.ones(self.num_slots, dtype=bool)
        active = np.asarray(active, dtype=bool)
        for name, shape in (("tokens", tuple(tokens.shape)), ("active", active.shape)):
            if shape != (self.num_slots,):
                raise InvalidArgument(
                    f"append: {name} of shape {shape}; allowed: ({self.num_slots},)"
                )
        moving = active & (self.positions > 0)
        if full := np.flatnonzero(moving & (self.positions >= self.max_length)).tolist():
            raise InvalidArgument(
                f"append: slots {full} already hold max_length={self.max_length} tokens"
            )
        return moving

    def extend(
        self, slots: Sequence[int] | np.ndarray, tokens: Tensor, lengths: Sequence[int] | np.ndarray
    ) -> Tensor:
        """Add several tokens to the texts of some slots, and return the states after each.

        The forwards run in length-sorted micro-batches of the new tokens, which attend to what the
        slots hold. The other slots are not touched.

        Args:
            slots: (n,) host data, each slot at most once.
            tokens: (n, K) right-padded, on any device.
            lengths: (n,) host data, how many tokens each slot is given, 1..K.

        Returns:
            (n, K, H) the states, in the order of `slots`. Those to the right of a row's last token
            mean nothing.

        Raises:
            InvalidArgument: a slot, a shape or a length is wrong, a slot was never prefilled, or
                one has too little room; nothing has changed.
        """
        slots, lengths = self._checked("extend", slots, tokens, lengths)
        starts = self.positions[slots]
        if empty := slots[starts == 0].tolist():
            raise InvalidArgument(f"extend: slots {empty} hold no text; prefill begins one")
        if full := slots[starts + lengths > self.max_length].tolist():
            raise InvalidArgument(
                f"extend: slots {full} would hold more than max_length={self.max_length} tokens"
            )
        tokens, groups = self.known_ids(tokens), micro_batches(lengths, self.max_batch_tokens)

        def forward(group: np.ndarray) -> Tensor:
            new = tokens[self._upload(group), : int(lengths[group].max())]
            at = self._upload(slots[group])
            states = self._slots.extend(at, new, starts[group], lengths[group])
            return pad(states, (0, 0, 0, tokens.shape[1] - new.shape[1]))

        with acting(self.trunk):
            states = in_order([forward(group) for group in groups], groups)
        self.positions[slots] += lengths
        return states

    def fork(
        self, sources: Sequence[int] | np.ndarray, targets: Sequence[int] | np.ndarray
    ) -> None:
        """Copy slot sources[i] onto slot targets[i]. All sources are read before any target is
        written, so that slots can be swapped.

        Args:
            sources: (n,) host data; a slot may be copied several times.
            targets: (n,) host data, each slot at most once.
        """
        sources, targets = np.asarray(sources, dtype=np.int64), np.asarray(targets, dtype=np.int64)
        self._check_slots("sources", sources)
        self._check_slots("targets", targets, unique=True)
        if len(sources) != len(targets):
            raise InvalidArgument(
                f"fork: {len(sources)} sources and {len(targets)} targets; allowed: as many of each"
            )
        # Only the places that the longest source fills are copied. What lies behind them is masked
        # until new tokens overwrite it.
        width = int(self.positions[sources].max(initial=0))
        if width:
            self._slots.fork(self._upload(sources), self._upload(targets), width)
        self.positions[targets] = self.positions[sources]

    def states(self, tokens: Tensor, lengths: Sequence[int] | np.ndarray) -> Tensor:
        """Return the states of whole texts, without the cache and with the ambient grad mode.

        The batch is not split: pass one micro-batch.

        Args:
            tokens: (B, L) right-padded.
            lengths: (B,) host data.

        Returns:
            (B, L, H), in which state t has read tokens 0..t.
        """
        return hidden_states(self.trunk, self.known_ids(tokens), lengths)

    def _make_slots(self, compile: bool) -> "KVSlots | TextSlots":
        """Try out whether the model can be cached, and make the slots of the fitting kind."""
        from .probing import why_uncached
        from .recompute import TextSlots
        from .slot_cache import KVSlots

        # The verdict is kept on the model, so that a copy of it has it too: the caches of a policy,
        # which is a copy of the env's reference, need no trial of their own. All that the verdict
        # depends on is in the key.
        tried = vars(self.trunk).setdefault("tried_caches", {})
        key = (self.max_length, self.trunk.dtype, self.trunk.config._attn_implementation)
        if key not in tried:
            tried[key] = why_uncached(self.trunk, self.max_length)
        reason = tried[key]
        if reason is None:
            return KVSlots(self.trunk, self.num_slots, self.max_length, compile)
        warnings.warn(
            f"{type(self.trunk).__name__} cannot be cached per slot ({reason}): every append reads "
            "each slot's whole text again, so a text of n tokens costs n*n/2 token forwards "
            "instead of n",
            RuntimeWarning,
            stacklevel=3,
        )
        return TextSlots(self.trunk, self.num_slots, self.max_length, self.max_batch_tokens)

    def _upload(self, array: Any) -> Tensor:
        return upload(np.asarray(array, dtype=np.int64), self.device)

    def known_ids(self, tokens: Tensor) -> Tensor:
        """Return token ids on the model's device; those that the model lacks are its last one."""
        # An index out of range on CUDA ends the whole process, and checking would wait for the
        # device.
        return tokens.to(self.device, non_blocking=True).clamp(0, self._last_id)

    def _checked(
        self, call: str, slots: Any, tokens: Tensor, lengths: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return `slots` and `lengths` as arrays (n,) that fit each other and `tokens` (n, K)."""
        slots, lengths = np.asarray(slots, dtype=np.int64), np.asarray(lengths, dtype=np.int64)
        self._check_slots("slots", slots, unique=True)
        if lengths.shape != slots.shape or len(tokens) != len(slots):
            raise InvalidArgument(
                f"{call}: {len(slots)} slots, {len(tokens)} texts and {lengths.shape} lengths"
            )
        limit = min(tokens.shape[1], self.max_length)
        if len(slots) == 0 or lengths.min() < 1 or lengths.max() > limit:
            raise InvalidArgument(
                f"{call}: lengths={lengths.tolist()}; allowed: one or more, each 1..{limit}"
            )
        return slots, lengths

    def _check_slots(self, name: str, slots: np.ndarray, unique: bool = False) -> None:
        wrong = slots.ndim != 1 or bool(((slots < 0) | (slots >= self.num_slots)).any())
        if wrong or (unique and len(np.unique(slots)) < len(slots)):
            how = "each once" if unique else "in any number"
            raise InvalidArgument(
                f"{name}={slots.tolist()}; allowed: slots 0..{self.num_slots - 1}, {how}"
            )


def trunk_of(model: Any) -> Any:
    """Return the transformers base model inside a model with a head or a peft model. A base model
    is returned as it is."""
    # The wrapper goes first: a peft model has a `base_model` too, and it is something else.
    return unwrapped(model).base_model


def text_part(trunk: Any) -> Any:
    """Return the module that reads text: the trunk itself, or the language model inside a trunk
    that also reads images or sound."""
    return trunk.get_decoder() if hasattr(trunk, "get_decoder") else trunk


@contextmanager
def acting(trunk: Any) -> Iterator[None]:
    """Switch gradients off and eval mode on, and restore both afterwards. Dropout and gradient
    checkpointing, which train mode brings, would break a cache."""
    with evaluating(trunk), torch.no_grad():
        yield


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models into eval mode, and restore each module's own mode afterwards."""
    # This runs at every step: the modules of a model that is in eval mode already are not visited.
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
    """Return the memory in bytes that `CachedLM(trunk, num_slots, max_length)` will take for its
    slots, measured on a cache of one token."""
    from .slot_cache import KVSlots

    trunk = trunk_of(trunk)
    try:
        slots = KVSlots(trunk, 1, 1)
        token = torch.zeros(1, 1, dtype=torch.int64, device=trunk.device)
        with acting(trunk):
            slots.prefill(token[0], token)
    # A model that cannot be cached may raise anything. It keeps token ids instead, 8 bytes each.
    except Exception:
        return num_slots * max_length * 8
    return num_slots * max_length * (slots.nbytes or 8)


def _check_positions(trunk: Any, max_length: int) -> None:
    """Raise `ModelError` where the model's table of learned positions is shorter than `max_length`:
    reading beyond a table ends a CUDA process."""
    named = getattr(trunk.config.get_text_config(), "max_position_embeddings", None)
    for name, module in text_part(trunk).named_modules():
        if isinstance(module, nn.Embedding) and ("wpe" in name or "pos" in name):
            # Some tables begin with rows that no position uses, so the config's number counts too.
            positions = min(module.num_embeddings, named or module.num_embeddings)
            if positions < max_length:
                raise ModelError(
                    f"max_length={max_length}: {type(trunk).__name__} has {positions} positions; "
                    "allowed: at most that many"
                )
